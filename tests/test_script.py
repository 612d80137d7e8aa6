"""Shot scripts: what they refuse, how lengths are rounded, which chunks come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lltk.stream.chunks import Chunking
from lltk.stream.positions import frame_positions
from lltk.stream.script import load_script, parse_script, single_shot

pytestmark = pytest.mark.cpu

WAN = Chunking(8, 24)
"""Chunks of 32 video frames, the first of 29."""

SCRIPT = """
- caption: A red circle
    moves to the right.
  seconds: 4
- caption: A blue square spins.
  seconds: 2.5
- {caption: 红色的圆, seconds: 0.1}
"""


def test_a_script_is_read(tmp_path: Path) -> None:
    path = tmp_path / "script.yaml"
    path.write_text(SCRIPT, encoding="utf-8")
    script = load_script(path)
    assert [shot.caption for shot in script] == [
        "A red circle moves to the right.",
        "A blue square spins.",
        "红色的圆",
    ]
    assert [shot.seconds for shot in script] == [4, 2.5, 0.1]


def test_a_planned_video() -> None:
    script = [*single_shot("a", 4), *single_shot("b", 2.5), *single_shot("c", 0.1)]
    chunks = WAN.chunks(script)
    assert [c.index for c in chunks] == list(range(6))
    assert [c.shot for c in chunks] == [0, 0, 0, 1, 1, 2]
    assert [c.opens_shot for c in chunks] == [True, False, False, True, False, True]
    cut = "The scene transitions. "
    assert [c.prompt for c in chunks] == ["a", "a", "a", f"{cut}b", "b", f"{cut}c"]
    assert [c.frames for c in chunks[:3]] == [range(29), range(29, 61), range(61, 93)]
    assert chunks[-1].frames == range(157, 189)
    other = Chunking(8, 24, scene_cut="CUT ").chunks(script)
    assert [c.prompt for c in other] == ["a", "a", "a", "CUT b", "b", "CUT c"]


def test_the_statement_says_what_was_asked_and_made() -> None:
    script = (*single_shot("a", 4), *single_shot("b", 0.1))
    assert WAN.statement(script).splitlines() == [
        "a shot is whole chunks, at least one: 32 frames each, 29 for the video's first, at 24 fps",
        "shot 1: 4 s asked, 3.88 s made (93 frames, chunks: 3)",
        "shot 2: 0.1 s asked, 1.33 s made (32 frames, chunks: 1)",
    ]


@given(
    seconds=st.lists(st.floats(0.01, 60), min_size=1, max_size=6),
    chunk=st.integers(1, 9),
    fps=st.sampled_from([8, 24, 29.97]),
    stride=st.integers(1, 8),
)
def test_no_other_whole_number_of_chunks_is_nearer(
    seconds: list[float], chunk: int, fps: float, stride: int
) -> None:
    chunking = Chunking(chunk, fps, stride)
    script = [shot for s in seconds for shot in single_shot("a", s)]
    chunks = chunking.chunks(script)
    frames = [f for c in chunks for f in c.frames]
    latents = len(chunks) * chunk
    assert frames == list(range(stride * (latents - 1) + 1)), "the VAE's count, without gaps"
    later = stride * chunk
    for index, (asked, made) in enumerate(zip(seconds, chunking.lengths(script), strict=True)):
        own = [c for c in chunks if c.shot == index]
        assert (made.asked, made.chunks) == (asked, len(own)) and own[0].opens_shot
        assert made.frames == sum(len(c.frames) for c in own)
        error = abs(made.frames - asked * fps)
        others = [made.frames + later] + [made.frames - later] * (made.chunks > 1)
        assert all(error <= abs(other - asked * fps) + 1e-6 for other in others)


def test_chunk_frames_of_wan() -> None:
    """32 latent frames are 125 video frames, 384 are 1533 (longest published video)."""
    assert [len(WAN.frames(i)) for i in range(3)] == [29, 32, 32]
    assert WAN.frames(3).stop == 125
    assert WAN.frames(47).stop == 1533


GOOD = {"caption": "a", "seconds": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"captoin": "a", "seconds": 1}], r"unknown key 'captoin'; did you mean 'caption'\?"),
        ([{**GOOD, "zzz": 1}], r"unknown key 'zzz'; known keys: caption, seconds"),
        ([{"caption": "a"}], r"seconds: Field required"),
        ([{**GOOD, "caption": " \n"}], r"caption: is empty; say what the shot shows"),
        ([{**GOOD, "caption": True}], r"caption: Input should be a valid string"),
        ([{**GOOD, "seconds": "4"}], r"seconds: Input should be a valid number"),
        ([{**GOOD, "seconds": True}], r"seconds: Input should be a valid number"),
        ([{**GOOD, "seconds": 0}], r"a shot cannot last 0 s; write more than 0 and at most 3600"),
        ([{**GOOD, "seconds": -2}], r"a shot cannot last -2 s"),
        ([{**GOOD, "seconds": 3601}], r"a shot cannot last 3601 s"),
        ([{**GOOD, "seconds": float("inf")}], r"holds inf, which is not finite"),
        ([{**GOOD, "seconds": float("nan")}], r"holds nan, which is not finite"),
    ],
)
def test_a_shot_that_does_not_fit(data: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^film\.yaml: shot 2: .*{message}") as caught:
        parse_script([GOOD, *data], "film.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "caption: a\nseconds: 2", "just a prompt", "[a, b]"])
def test_what_is_no_list_of_shots(tmp_path: Path, text: str) -> None:
    path = tmp_path / "film.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"film\.yaml: is not a list of shots; write a caption"):
        load_script(path)


def test_unreadable_scripts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\)"):
        load_script(tmp_path / "film.yaml")
    (tmp_path / "film.yaml").write_text("- [")
    with pytest.raises(ValueError, match=r"film\.yaml: is not YAML: "):
        load_script(tmp_path / "film.yaml")


@pytest.mark.parametrize("fps", [0, -24, float("inf"), float("nan")])
def test_misfit_rates(fps: float) -> None:
    with pytest.raises(ValueError, match=r"is not a frame rate"):
        Chunking(8, fps)


def test_single_shot() -> None:
    chunks = WAN.chunks(single_shot(" a  prompt ", 2.4))
    assert [c.prompt for c in chunks] == ["a prompt"] * 2
    with pytest.raises(ValueError, match=r"^prompt: caption: is empty"):
        single_shot("", 2)


def test_positions_jump_at_every_cut() -> None:
    script = [shot for s in (1, 3, 1) for shot in single_shot("a", s)]
    chunks = WAN.chunks(script)
    assert [c.cuts for c in chunks] == [c.shot for c in chunks]
    positions = frame_positions([c.cuts for c in chunks], WAN.size, 8.0)
    assert positions.dtype == torch.float64
    assert positions[::8].tolist() == [0, 16, 24, 40]
    assert set(positions.diff().tolist()) == {1, 9}
    for chunk in chunks:
        own = frame_positions([chunk.cuts], WAN.size, 8.0, first=chunk.index)
        assert torch.equal(own, positions[8 * chunk.index :][:8])


def test_positions_are_exact_far_out() -> None:
    """A fractional offset survives ten million frames; in float32 it would not."""
    far = frame_positions([3], 2, 0.25, first=5_000_000)
    assert far.tolist() == [10_000_000.75, 10_000_001.75]
    assert far.float().double().tolist() != far.tolist()
    assert frame_positions([0, 5], 2).tolist() == [0, 1, 2, 3], "no offset unless asked for"
