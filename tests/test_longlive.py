"""A folder's clips as LongLive puts them together: from rules alone, and from real files."""

from __future__ import annotations

import logging
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from footage import FPS, damage, numbered, numbers, write_clip
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lltk.graph.geometry import Geometry
from lltk.stream.script import SCENE_CUT
from lltk.tasks.clips import FolderLatents, folder_samples
from lltk.train.assembly import Rules, Shot, Unfilled, assemble, first_usable, place_of, starts
from lltk.train.longlive import LongLiveClips
from lltk.train.recipe import train_section

pytestmark = pytest.mark.cpu

SEED = 5
FIRST, LATER = 5, 8
"""Video frames of a chunk of two latents."""
WHOLE = FIRST + 2 * LATER


def rules(**more: Any) -> Rules:
    return Rules(**{"chunk": 2, "chunks": 3, "fps": Fraction(16), **more})


def clips(folder: Path, **more: Any) -> LongLiveClips:
    return LongLiveClips(folder, rules(**more), 32, 32, SEED)


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[list[Shot], Rules]:
    rates = st.sampled_from(
        [Fraction(n) for n in (8, 12, 16, 24, 25, 30)] + [Fraction(30000, 1001)]
    )
    count = draw(st.integers(1, 4))
    shots = [Shot(draw(rates), draw(st.integers(1, 90)), f"shot {i}") for i in range(count)]
    return shots, rules(
        chunks=draw(st.integers(1, 6)),
        max_chunks_per_shot=draw(st.integers(0, 2)),
        single_clip=draw(st.booleans()),
    )


@given(settings_of())
def test_a_sample_begins_wherever_it_can_be_filled(given: tuple[list[Shot], Rules]) -> None:
    """The places are those of which a sample without padding comes, a second's leaps included."""
    shots, how = given
    found = set(starts(shots, how))
    for clip, shot in enumerate(shots):
        for frame in range(shot.frames):
            try:
                chunks = assemble(shots, how, (clip, frame)).chunks
            except Unfilled:
                filled = False
            else:
                filled = (chunks[0].clip, chunks[0].frames[0]) == (clip, frame)
            if shot.frames <= 50:
                assert ((clip, frame) in found) == filled
            else:
                assert filled or (clip, frame) not in found


@given(settings_of())
def test_chunks_are_whole_and_follow_each_other(given: tuple[list[Shot], Rules]) -> None:
    shots, how = given
    for start in starts(shots, how)[:5]:
        chunks = assemble(shots, how, start).chunks
        assert [len(chunk.frames) for chunk in chunks] == [FIRST, *[LATER] * (how.chunks - 1)]
        run = 0
        for number, chunk in enumerate(chunks):
            shot, before = shots[chunk.clip], chunks[number - 1] if number else None
            assert chunk.frames[0] >= 0 and chunk.frames[-1] < shot.frames
            span = (chunk.frames[-1] - chunk.frames[0]) / shot.fps
            assert abs(span - (len(chunk.frames) - 1) / how.fps) <= 1 / shot.fps
            leap = before is not None and chunk.clip == before.clip and chunk.opens
            if before is not None and chunk.clip == before.clip:
                skipped = (chunk.frames[0] - before.frames[-1]) / shot.fps
                assert abs(skipped - 1 / how.fps - leap) <= 1 / shot.fps
            assert not leap or run == how.max_chunks_per_shot
            run = 1 if chunk.opens else run + 1
            assert not how.max_chunks_per_shot or run <= how.max_chunks_per_shot
            assert chunk.opens == (before is None or leap or chunk.clip != before.clip)
            assert chunk.prompt == (SCENE_CUT if number and chunk.opens else "") + shot.caption


def test_starts_respect_the_second_that_is_left_out() -> None:
    """A clip of four chunks and half a second fills four, but not with a second left out."""
    shots = [Shot(Fraction(16), FIRST + 3 * LATER + 8, "one")]
    assert starts(shots, rules(chunks=4)) == [(0, frame) for frame in range(9)]
    assert not starts(shots, rules(chunks=4, max_chunks_per_shot=2))
    longer = [Shot(Fraction(16), FIRST + 3 * LATER + 16 + 1, "one")]
    assert starts(longer, rules(chunks=4, max_chunks_per_shot=2)) == [(0, 0), (0, 1)]


def test_long_clips_have_as_many_starts_as_short_ones() -> None:
    found = Counter(
        clip
        for clip, _ in starts([Shot(Fraction(16), n, "one") for n in (WHOLE + 60, 9000)], rules())
    )
    assert all(50 <= count <= 100 for count in found.values())


def test_order_and_scan() -> None:
    assert sorted(["b", "10", "9", "010", "a"], key=place_of) == ["9", "010", "10", "a", "b"]
    assert first_usable(2, [False, True, False, False]) == 1
    assert first_usable(1, [True, False, False, True]) == 3
    assert first_usable(0, [False, False]) is None


def test_a_folder_is_a_sample_of_shots(tmp_path: Path) -> None:
    """Held-out samples are the folders by name, each from its first clip on."""
    write_clip(tmp_path, "b", 2, numbered(0, FIRST + LATER + 3), "one")
    write_clip(tmp_path, "b", 10, numbered(30, 2 * LATER), "two")
    write_clip(tmp_path, "a", 1, numbered(7, WHOLE + 9), "other")
    found = clips(tmp_path)
    sample = found.sample(~SEED, 1)
    assert sample.video.shape == (WHOLE, 32, 32, 3) and sample.video.dtype == torch.uint8
    assert numbers(sample.video) == [*range(FIRST + LATER), *range(30, 30 + LATER)]
    assert sample.prompts == ("one", "one", f"{SCENE_CUT}two")
    assert sample.opens == (True, False, True)
    assert sample.valid is None
    for index in (0, 2):
        assert numbers(found.sample(~SEED, index).video) == list(range(7, 7 + WHOLE))
    assert not found.skipped


def test_an_epoch_asks_for_every_folder_once(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    for name in names:
        write_clip(tmp_path, name, 1, numbered(0, WHOLE + 6), name)
    one, other = clips(tmp_path), clips(tmp_path)
    orders, begun = [], set()
    for epoch in range(4):
        samples = [one.sample(SEED, 4 * epoch + place) for place in range(4)]
        orders.append([sample.prompts[0] for sample in samples])
        begun |= {numbers(sample.video)[0] for sample in samples}
        again = other.sample(SEED, 4 * epoch + 2)
        assert torch.equal(again.video, samples[2].video)
    assert all(sorted(order) == names for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert len(begun) > 3 and begun <= set(range(7))


@pytest.mark.parametrize("fps", [10.0, 25.0, 30.0])
def test_frames_are_those_of_the_rule(fps: float, tmp_path: Path) -> None:
    """Slower clips repeat frames, faster ones lose some."""
    frames = 60 if fps > 16 else 20
    write_clip(tmp_path, "a", 0, numbered(0, frames), "one", fps)
    wanted = assemble([Shot(Fraction(fps), frames, "one")], rules()).chunks
    said = numbers(clips(tmp_path).sample(~SEED, 0).video)
    assert said == [frame for chunk in wanted for frame in chunk.frames]


def test_a_long_shot_is_cut_and_goes_on_a_second_later(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", 0, numbered(0, WHOLE + 16), "one")
    sample = clips(tmp_path, max_chunks_per_shot=2).sample(~SEED, 0)
    begin = FIRST + LATER
    assert numbers(sample.video) == [*range(begin), *range(begin + 16, begin + 16 + LATER)]
    assert sample.prompts == ("one", "one", f"{SCENE_CUT}one")
    assert sample.opens == (True, False, True)


def test_padding_repeats_the_last_frame_and_prompt(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", 0, numbered(0, FIRST + 2), "one")
    write_clip(tmp_path, "a", 1, numbered(20, LATER + 2), "two")
    write_clip(tmp_path, "b", 0, numbered(0, WHOLE), "whole")
    write_clip(tmp_path, "c", 0, numbered(0, FIRST), "little")
    write_clip(tmp_path, "d", 0, numbered(0, FIRST - 1), "nothing")
    found = clips(tmp_path, allow_padding=True, min_latent_frames=4)
    sample = found.sample(~SEED, 0)
    assert numbers(sample.video) == [*range(FIRST), *range(20, 28), *[27] * LATER]
    assert sample.prompts == ("one", *[f"{SCENE_CUT}two"] * 2)
    assert sample.opens == (True, True, False)
    assert [found.sample(~SEED, index).valid for index in range(3)] == [4, 6, 4]
    assert found.skipped == {
        tmp_path / "video/c": "the clips fill 2 latent frames, fewer than the 4 of "
        "min_latent_frames",
        tmp_path / "video/d": "every clip is too short for the first chunk",
    }

    class Encoder:
        device = torch.device("cpu")

        def latents(self, video: Tensor, ranks: int) -> Tensor:
            assert ranks == 1
            return video[:, :, ::4]

        def text(self, prompts: tuple[str, ...]) -> Tensor:
            return torch.zeros(len(prompts), 1)

    encoder: Any = Encoder()
    batch = FolderLatents(found, encoder).batch(~SEED, range(2))
    assert batch["valid"].tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert "valid" not in FolderLatents(clips(tmp_path), encoder).batch(~SEED, range(1))


def test_folders_of_no_use_are_named_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_clip(tmp_path, "a", 0, numbered(0, WHOLE - 1), "short")
    write_clip(tmp_path, "b", 0, numbered(0, WHOLE), "good")
    write_clip(tmp_path, "c", 0, numbered(0, WHOLE), None)
    write_clip(tmp_path, "d", 0, numbered(0, WHOLE), "")
    path = write_clip(tmp_path, "", 7, numbered(0, WHOLE), "top")
    with caplog.at_level(logging.WARNING):
        found = clips(tmp_path)
    reasons = {
        "video/a": "the clips fill 2 of 3 chunks",
        "video/c/0.mp4": "has no caption",
        "video/c": "no clip has a caption",
        "video/d/0.mp4": "its caption is empty",
        "video/d": "no clip has a caption",
        "video/7.mp4": "is in no folder; put it into video/<sample>/",
        "caption/7.json": "has no clip",
    }
    skipped = {str(where.relative_to(tmp_path)): why for where, why in found.skipped.items()}
    assert skipped.keys() == reasons.keys()
    assert all(skipped[where].startswith(why) for where, why in reasons.items()), skipped
    assert f"skipped {path}: is in no folder" in caplog.text
    assert {found.sample(seed, i).prompts[0] for seed in (SEED, 0) for i in range(4)} == {"good"}


def test_a_name_that_is_no_number_comes_last(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", 12, numbered(0, FIRST), "numbered")
    write_clip(tmp_path, "a", 3, numbered(0, 2 * LATER), "last")
    for path in (tmp_path / "video/a/3.mp4", tmp_path / "caption/a/3.json"):
        path.rename(path.with_stem("a trailer"))
    cut = f"{SCENE_CUT}last"
    assert clips(tmp_path).sample(~SEED, 0).prompts == ("numbered", cut, "last")


def test_a_damaged_clip_costs_its_folder(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", 0, numbered(0, WHOLE), "good")
    path = write_clip(tmp_path, "b", 0, numbered(0, WHOLE), "damaged")
    damage(path)
    found = clips(tmp_path)
    assert {found.sample(SEED, index).prompts[0] for index in range(4)} == {"good"}
    assert list(found.skipped) == [path]
    damage(tmp_path / "video/a/0.mp4")
    assert "every folder has a damaged clip" in refused(clips(tmp_path).sample, SEED, 0)


def test_one_clip_a_sample(tmp_path: Path) -> None:
    """In training it is any that fills it, held out the first such."""
    write_clip(tmp_path, "a", 0, numbered(0, FIRST + LATER + 1), "short")
    write_clip(tmp_path, "a", 1, numbered(20, WHOLE), "one")
    write_clip(tmp_path, "a", 2, numbered(10, WHOLE + 2), "two")
    found = clips(tmp_path, single_clip=True)
    assert {found.sample(SEED, i).prompts for i in range(12)} == {("one",) * 3, ("two",) * 3}
    assert numbers(found.sample(0, 0).video) == list(range(20, 20 + WHOLE))


def test_no_sample_is_an_error(tmp_path: Path) -> None:
    assert "has no video/; lay it out as" in refused(clips, tmp_path)
    path = write_clip(tmp_path, "a", 0, numbered(0, WHOLE - 1), "short")
    message = refused(clips, tmp_path)
    assert "no sample of 3 chunks of 2 latent frames at 16 fps" in message
    assert "or train.data.longlive.allow_padding=true" in message
    assert f"skipped {path.parent}: the clips fill 2 of 3 chunks" in message
    assert "allow_padding" not in refused(clips, tmp_path, allow_padding=True, min_latent_frames=6)


def test_a_recipe_says_how_a_folder_is_read(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", 0, numbered(0, WHOLE), "one")
    write_clip(tmp_path, "b", 0, numbered(0, FIRST), "two")
    data: dict[str, Any] = {"folder": str(tmp_path), "fps": FPS}
    geometry = Geometry(height=32, width=32, chunk=2, frames=6)

    def read(longlive: dict[str, Any]) -> list[int | None]:
        section = train_section(
            {"data": data | {"longlive": longlive}, "steps": 1, "lr": 1.0, "seed": SEED}, "recipe"
        )
        samples = folder_samples(section, geometry, 4)
        return [samples.sample(~SEED, index).valid for index in range(2)]

    assert read({}) == [None, None]
    assert read({"allow_padding": True}) == [6, 2]
    assert read({"allow_padding": True, "min_latent_frames": 4}) == [6, 6]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"longlive": {}}, "name one in train.data.folder"),
        ({"folder": "x", "longlive": {}, "shots": 2}, "remove one of the two"),
        ({"folder": "x", "longlive": {"min_latent_frames": 8}}, "allow_padding=true"),
        ({"folder": "x", "longlive": {"padding": True}}, "allow_padding"),
    ],
)
def test_settings_that_do_not_fit(data: dict[str, Any], said: str) -> None:
    message = refused(train_section, {"data": data, "steps": 1, "lr": 1.0}, "recipe")
    assert said in message and "longlive" in message, message
