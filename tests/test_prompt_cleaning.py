"""Prompts are cleaned as diffusers cleans them for Wan."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lltk.stream.script import single_shot
from lltk.stream.text import clean

pytestmark = pytest.mark.cpu

HARD = (
    "a man says “hello” — it’s late",
    "ﬁre and ﬂame",
    "ＡＢＣ sign",
    "cafÃ© at night",
    "voilÃ\xa0 la mer",
    "wait\x85 what",
    "it&rsquo;s &quot;late&quot; &amp;amp; loud",
    "cafe\u0301",
    "a\u00a0b\u3000c\u200bd\ufeff",
    "\x1b[31mred\x1b[0m",
    "one\r\ntwo\u2028three\tfour",
    "&lt;b&gt;bold&lt;/b&gt; & more",
    "\ud83d\udd34 joined".encode("utf-16", "surrogatepass").decode("utf-16"),
    "ðŸ”´ red",
    "1½ ﷺ ㎏",
    " \n ",
)


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(HARD))
@example(" ".join(HARD))
def test_cleaning_is_that_of_diffusers(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean(text) == prompt_clean(text)


@pytest.mark.parametrize("text", HARD[:-1], ids=ascii)
def test_a_shot_keeps_what_cleaning_needs(text: str) -> None:
    (shot,) = single_shot(text, 1)
    assert clean(shot.caption) == clean(text)
