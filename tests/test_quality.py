"""Quality: whose videos are scored, and that only the true ones get the full score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from streams import opened, planned, save_pipeline
from test_bounded_stream import BOUNDED
from torch import Tensor

from lltk.bench.quality import (
    PARTS,
    STRETCH,
    draw_stories,
    identity_over_time,
    score_video,
    streamed,
)
from lltk.models.tiny.world import FPS, Story, render
from lltk.stream import session
from lltk.stream.script import SCENE_CUT, Shot
from lltk.stream.text import TextEncoder
from lltk.streaming import open_runtime

pytestmark = pytest.mark.cpu


def shown(story: Story) -> Tensor:
    """What a perfect model would make: uint8 [F, 3, H, W]."""
    return (render([story])[0] * 127.5 + 127.5).round().to(torch.uint8)


def test_stories_and_their_prompts() -> None:
    stories = draw_stories(seed=3, count=4, shots=2, chunks=3, chunk=2)
    assert stories == draw_stories(3, 4, 2, 3, 2) != draw_stories(4, 4, 2, 3, 2)
    for story in stories:
        assert story.opens == (0, 3) and story.frames == 4 * 2 * 6 - 3
        first, second = story.captions
        assert story.prompts(SCENE_CUT) == [*[first] * 3, SCENE_CUT + second, second, second]
    assert len({story.captions for story in stories}) == 4


@pytest.mark.parametrize("passes", [(), (BOUNDED,)], ids=["absolute", "bounded"])
def test_streamed_chunks_are_a_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: tuple[str, ...]
) -> None:
    """Noise is equal. They go over a cut, until the window has let chunks go."""
    plan = planned(save_pipeline(tmp_path), *passes)
    script = (
        Shot(caption="a red circle moving left", seconds=3),
        Shot(caption="a blue square moving up", seconds=5),
    )
    chunks = plan.chunking.chunks(script)
    opens = [chunk.index for chunk in chunks if chunk.opens_shot]
    assert opens == [0, 3] and len(chunks) == 8
    encoder = TextEncoder(plan.folder, plan.geometry.text_tokens)
    text = torch.cat([encoder.encode([chunk.prompt]) for chunk in chunks])[None]
    ours = list(streamed(open_runtime(plan), text, opens, steps=4, seed=5))

    noise = noises(seed=5)
    monkeypatch.setattr(session, "chunk_noise", lambda *given: next(noise))
    stream, _ = opened(plan, script)
    with stream:
        theirs = [report.latents for report in stream]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    uncut = list(streamed(open_runtime(plan), text, [0], steps=4, seed=5))
    same = [torch.equal(a, b) for a, b in zip(ours, uncut, strict=True)]
    assert same[:6] == [True] * 6 and not any(same[6:]), "no shot sink"


def noises(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(1, 4, 2, 2, 4, generator=generator)


def test_truth_scores_full_and_other_captions_do_not() -> None:
    stories = draw_stories(seed=0, count=4, shots=2, chunks=6, chunk=3)
    videos = [shown(story) for story in stories]
    scores = [score_video(video, story) for video, story in zip(videos, stories, strict=True)]
    assert all([shot.index for shot in video] == [0, 1] for video in scores)
    shots = [shot for video in scores for shot in video]
    assert all(shot.right == (True,) * len(PARTS) for shot in shots)
    assert min(shot.kept for shot in shots) > 95
    others = stories[1:] + stories[:1]
    wrong = [shot for v, s in zip(videos, others, strict=True) for shot in score_video(v, s)]
    share = [sum(shot.right) / len(PARTS) for shot in wrong]
    assert sum(share) / len(share) < 0.6
    assert not any(all(shot.right) for shot in wrong)


def test_identity_of_short_shots_is_unknown() -> None:
    (story,) = draw_stories(seed=1, count=1, shots=2, chunks=3, chunk=3)
    assert all(math.isnan(shot.kept) for shot in score_video(shown(story), story))


def test_identity_over_time_sees_where_another_shot_goes_on() -> None:
    one, two = (
        shown(story) for story in draw_stories(seed=2, count=2, shots=1, chunks=14, chunk=3)
    )
    kept = identity_over_time(one)
    assert len(kept) == (len(one) - STRETCH) // STRETCH
    assert min(kept) > 95
    half = 5 * FPS
    changed = identity_over_time(torch.cat([one[:half], two[half:]]))
    assert changed[0] == kept[0]
    assert max(changed[3:]) < 90
