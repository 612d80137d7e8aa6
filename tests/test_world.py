"""The tiny world: what is rendered is what the attributes say, for ever, and on chunk borders."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from helpers import refused
from torch import Tensor

from lltk.models.tiny import world
from lltk.models.tiny.world import Scene, Shot, Story

pytestmark = pytest.mark.cpu

MINUTE = 60 * world.FPS + 1


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shot(**changes: object) -> Shot:
    scene = {k: changes.pop(k) for k in list(changes) if k in Scene.__dataclass_fields__}
    plain = Shot(Scene("circle", "red", "left", "dark"), "", 20.0, "blue", 0.0, (64, 64), 2.0, 0.0)
    return replace(plain, scene=replace(plain.scene, **scene), **changes)


def frames_of(one: Shot, frames: int = 1) -> Tensor:
    return world.render([Story((one,), (0,), 1, frames)])[0]


def cover(frames: Tensor) -> Tensor:
    """How far a red shape with a blue dot covers each pixel of a dark ground: [F, H, W].

    A pixel is a mixture of ground, red and blue; the shares of red and blue are solved for.
    """
    ground = frames[:1, :, 0, 0].T
    colours = torch.tensor([world.COLOURS["red"], world.COLOURS["blue"]]).T * 2 - 1
    shares = torch.linalg.pinv(colours - ground) @ (frames.flatten(2) - ground)
    return shares.sum(1).unflatten(1, frames.shape[2:])


def test_a_seed_gives_one_clip() -> None:
    first, again, other = (world.sample_clip(seeded(s), 29, 2, 2) for s in (3, 3, 4))
    assert first.story == again.story
    assert torch.equal(first.video, again.video)
    assert first.story != other.story
    assert not torch.equal(first.video, other.video)


def test_a_batch_is_its_clips() -> None:
    generator = seeded(0)
    stories = [world.draw_story(generator, 13, 2, 1) for _ in range(3)]
    video = world.render(stories)
    assert video.shape == (3, 13, 3, 128, 128)
    assert video.dtype == torch.float32
    assert float(video.abs().max()) <= 1
    generator = seeded(0)
    for own, story in zip(video, stories, strict=True):
        clip = world.sample_clip(generator, 13, 2, 1)
        assert clip.story == story
        assert torch.equal(clip.video, own)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_shots_begin_on_chunk_borders(chunk: int) -> None:
    borders = [0, *range(4 * chunk - 3, 24 * chunk, 4 * chunk)]
    seen = set()
    for seed in range(40):
        story = world.draw_story(seeded(seed), 24 * chunk - 3, 3, chunk)
        assert story.starts == tuple(borders[opening] for opening in story.opens)
        assert [story.shot_of_chunk.index(index) for index in range(3)] == list(story.opens)
        assert len(story.shot_of_chunk) == 6
        assert len(story.captions) == 3
        held = [frame for span in story.spans for frame in range(story.frames)[span]]
        assert held == list(range(story.frames))
        seen |= set(story.opens)
    assert seen == set(range(6))


def test_a_cut_is_where_the_story_says() -> None:
    clip = world.sample_clip(seeded(1), 61, 3, 2)
    change = clip.video.diff(dim=0).abs().mean((1, 2, 3))
    cuts = sorted(change.topk(2).indices.add(1).tolist())
    assert cuts == list(clip.story.starts[1:])


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert refused(world.draw_story, seeded(0), 30, 1, 2) == (
        "frames: 30 is not a whole number of chunks of 2 latent frames; the nearest that fit: "
        "29 and 37"
    )
    assert "the nearest that fit: 29;" not in refused(world.draw_story, seeded(0), 3, 1, 8)
    assert "use 1 to 4 (one a chunk)" in refused(world.draw_story, seeded(0), 29, 5, 2)
    assert "shots: 0 do not fit" in refused(world.draw_story, seeded(0), 29, 0, 2)


# Pictures


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("size", [14.0, 24.0])
def test_size_is_the_radius_of_a_disc_of_equal_area(shape: str, size: float) -> None:
    picture = cover(frames_of(shot(shape=shape, size=size)))[0]
    assert float(picture.sum()) == pytest.approx(math.pi * size**2, rel=0.01)
    pixels = torch.arange(128) + 0.5
    assert float((picture.sum(0) * pixels).sum() / picture.sum()) == pytest.approx(64, abs=0.1)
    assert float((picture.sum(1) * pixels).sum() / picture.sum()) == pytest.approx(64, abs=0.1)


def test_shapes_differ() -> None:
    pictures = [cover(frames_of(shot(shape=shape)))[0] for shape in world.SHAPES]
    for one, other in itertools.combinations(pictures, 2):
        overlap = torch.minimum(one, other).sum() / torch.maximum(one, other).sum()
        assert float(overlap) < 0.87


def test_edges_are_smooth() -> None:
    steps = [cover(frames_of(shot(centre=(64 + part / 8, 64))))[0] for part in range(9)]
    changes = [float((b - a).abs().max()) for a, b in itertools.pairwise(steps)]
    assert max(changes) < 0.2, "moving by an eighth of a pixel"


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_a_shape_stays_whole_for_a_minute(motion: str) -> None:
    generator = seeded(5)
    drawn = [world.draw_shot(generator) for _ in range(60)]
    one = next(made for made in drawn if made.scene.motion == motion)
    kept = replace(one.scene, shape="star", colour="red", background="dark")
    video = frames_of(replace(one, scene=kept, accent="blue"), MINUTE)
    # The ground is read from a pixel that a moving shape may cover: take it from another shot.
    ground = frames_of(replace(one, scene=kept, size=1e-3, centre=(0, 0)))
    difference = (video[::4] - ground).abs().amax(1) > 0.2
    area = difference.flatten(1).sum(1) / (math.pi * one.size**2)
    depth = world.PULSE_DEPTH * (motion == "pulsing")
    assert 0.85 * (1 - depth) ** 2 < float(area.min())
    assert float(area.max()) < 1.15 * (1 + depth) ** 2
    if depth:
        assert float(area.max() / area.min()) > 2
    assert float((video[1::4] - video[:-1:4]).abs().amax((1, 2, 3)).min()) > 0.1, "it always moves"


@pytest.mark.parametrize(("motion", "step"), world.DIRECTIONS.items())
def test_a_shape_moves_as_named(motion: str, step: tuple[int, int]) -> None:
    first, *_, last = frames_of(shot(motion=motion, rate=2.0), 33)
    moved = torch.roll(first, (64 * step[1], 64 * step[0]), (1, 2))
    assert torch.allclose(moved, last, atol=1e-4)
    assert not torch.allclose(first, last, atol=1e-1)


def test_a_circle_and_a_pulse_come_back() -> None:
    for motion, rate in (("circling", 1 / 32), ("pulsing", 1 / 32)):
        video = frames_of(shot(motion=motion, rate=rate), 33)
        assert torch.allclose(video[0], video[32], atol=1e-4)
        assert not torch.allclose(video[0], video[8], atol=1e-1)


# Captions


def test_a_caption_tells_its_scene() -> None:
    generator = seeded(0)
    shots = [world.draw_shot(generator) for _ in range(2000)]
    for one in shots:
        assert world.parse_caption(one.caption) == one.scene
        assert world.parse_caption(f"The scene transitions. {one.caption}") == one.scene
        assert set(re.findall(r"\w+|,", one.caption)) <= set(world.WORDS)
        assert one.accent != one.scene.colour
    spoken = {word for one in shots for word in re.findall(r"\w+|,", one.caption)}
    assert spoken == set(world.WORDS)
    for part in ("shape", "colour", "motion", "background"):
        values = [getattr(one.scene, part) for one in shots]
        counts = {value: values.count(value) for value in set(values)}
        assert min(counts.values()) > 0.8 * len(shots) / len(counts), counts


def test_a_caption_does_not_tell_identity() -> None:
    generator = seeded(0)
    told: dict[Scene, list[Shot]] = {}
    for _ in range(2000):
        one = world.draw_shot(generator)
        told.setdefault(one.scene, []).append(one)
    alike = max(told.values(), key=len)
    assert len(alike) > 5
    assert len({one.size for one in alike}) == len({one.tint for one in alike}) == len(alike)
    assert len({one.accent for one in alike}) > 1


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a red circle moving left", "names none as its background"),
        ("a red circle moving left and right on a dark background", "left and right as its motion"),
        ("a purple circle rising on a dark background", "none as its colour"),
        ("", "none as its shape"),
    ],
)
def test_other_captions_are_refused(caption: str, reason: str) -> None:
    assert reason in refused(world.parse_caption, caption)
