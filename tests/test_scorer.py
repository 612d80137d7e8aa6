"""The scorer: nearly never wrong on renders, clean or spoilt; at chance against other captions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from helpers import refused
from torch import Tensor
from torch.nn import functional as F

from lltk.bench.intervals import wilson
from lltk.bench.scorer import Read, Reading, agreement, distances, identity, read
from lltk.models.tiny import world
from lltk.models.tiny.world import Shot, Story

pytestmark = pytest.mark.cpu

COUNT = 200
PAIRS = 60
FRAMES = 9


@dataclass(frozen=True)
class Sample:
    """A shot, what is read from its first frames, and for some from its next ones."""

    shot: Shot
    first: Reading
    second: Reading | None


def spoilt(video: Tensor, generator: torch.Generator) -> Tensor:
    """The video blurred by 1.5 pixels, with noise, and with rounded cosines of 8×8 blocks."""
    pixels = torch.arange(128)
    blur = torch.exp(-((pixels - pixels[:, None]) ** 2) / (2 * 1.5**2))
    blur /= blur.sum(1, keepdim=True)
    video = blur @ video @ blur.T
    video = (video + 0.12 * torch.randn(video.shape, generator=generator)).clamp(-1, 1)
    rows = torch.arange(8)
    cosines = torch.cos(math.pi / 8 * (rows + 0.5) * rows[:, None]) / 2
    cosines[0] /= math.sqrt(2)
    step = 0.1 * (1 + rows + rows[:, None])
    blocks = video.unflatten(3, (16, 8)).unflatten(2, (16, 8)).transpose(3, 4)
    blocks = ((cosines @ blocks @ cosines.T) / step).round() * step
    return (cosines.T @ blocks @ cosines).transpose(3, 4).flatten(4).flatten(2, 3).clamp(-1, 1)


@cache
def samples(spoil: bool) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(COUNT):
        paired = index < PAIRS
        story = world.draw_story(generator, 2 * FRAMES - 1 if paired else FRAMES, 1, 1)
        video = world.render([story])[0]
        video = spoilt(video, generator) if spoil else video
        second = read(video[FRAMES:]) if paired else None
        made.append(Sample(story.shots[0], read(video[:FRAMES]), second))
    return made


def pairs(spoil: bool) -> list[tuple[Reading, Reading]]:
    return [(own.first, own.second) for own in samples(spoil) if own.second is not None]


def hits(spoil: bool) -> dict[str, int]:
    """How many of `COUNT` readings have each attribute right."""
    count = dict.fromkeys(("shape", "colour", "motion", "background", "accent", "size", "tint"), 0)
    for sample in samples(spoil):
        shown, shot = sample.first, sample.shot
        right = agreement(shown, shot.caption)
        for part in ("shape", "colour", "motion", "background"):
            count[part] += getattr(right, part)
        count["accent"] += shown.accent.value == shot.accent
        count["size"] += abs(math.log(shown.size / shot.size)) < math.log(1.1)
        count["tint"] += abs((shown.tint - shot.tint + 0.5) % 1 - 0.5) < 1 / 16
    return count


@pytest.mark.parametrize(("spoil", "share"), [(False, 0.995), (True, 0.98)])
def test_renders_are_read_right(spoil: bool, share: float) -> None:
    for part, right in hits(spoil).items():
        assert right >= share * COUNT, f"{part}: {right} of {COUNT}"


def test_other_captions_agree_by_chance() -> None:
    made = samples(False)
    others = [*made[1:], made[0]]
    scores = [
        agreement(own.first, other.shot.scene).score
        for own, other in zip(made, others, strict=True)
    ]
    kinds = (world.SHAPES, world.COLOURS, world.MOTIONS, world.BACKGROUNDS)
    chance = 100 * sum(1 / len(kind) for kind in kinds) / len(kinds)
    assert abs(sum(scores) / COUNT - chance) < 4
    assert all(agreement(own.first, own.shot.scene).score == 100 for own in made[:20])


@pytest.mark.parametrize("spoil", [False, True])
def test_identity_tells_shots_apart(spoil: bool) -> None:
    firsts, seconds = zip(*pairs(spoil), strict=True)
    others = (*seconds[1:], seconds[0])
    kept = [identity(*pair).score for pair in zip(firsts, seconds, strict=True)]
    changed = [identity(*pair).score for pair in zip(firsts, others, strict=True)]
    assert sum(kept) / PAIRS > 97
    assert sum(changed) / PAIRS < 40


def one_shot(seed: int, motion: str, frames: int) -> tuple[Shot, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = (world.draw_shot(generator) for _ in range(100))
    shot = next(one for one in drawn if one.scene.motion == motion)
    return shot, world.render([Story((shot,), (0,), 1, frames)])[0]


def test_each_detail_counts() -> None:
    shot, video = one_shot(0, "left", 9)
    own = read(video)
    other_accent = next(c for c in world.COLOURS if c not in (shot.accent, shot.scene.colour))
    for change in (
        {"size": shot.size * 1.25},
        {"accent": other_accent},
        {"tint": (shot.tint + 0.25) % 1},
    ):
        changed = world.render([Story((replace(shot, **change),), (0,), 1, 9)])[0]
        assert identity(own, read(changed)).score == pytest.approx(200 / 3), change
        assert agreement(read(changed), shot.scene).score == 100


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_a_minute_is_read_right(motion: str) -> None:
    shot, video = one_shot(1, motion, 20 * world.FPS + 1)
    assert agreement(read(video), shot.caption).score == 100
    assert identity(read(video[:40]), read(video[-40:])).score == 100


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_motion_is_read_from_order_and_pace(motion: str) -> None:
    shot, video = one_shot(2, motion, 25)
    still = agreement(read(video[:1].expand(25, -1, -1, -1)), shot.scene)
    assert still.shape and still.colour and still.background and not still.motion
    back = read(video.flip(0)).motion.value
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert back == opposite.get(motion, motion)
    assert read(video[:7]).motion.value is None


def test_frames_are_as_far_as_they_differ() -> None:
    """In per cent of a channel's range: 100 between black and white."""
    shot, video = one_shot(3, "pulsing", 24)
    own = distances(video, read(video))
    assert own.shape == (24,) and float(own.max()) < 2
    worse = video.clone()
    worse[5] += 0.2
    worse[6, :, :64] = -worse[6, :, :64]
    far = distances(worse.clamp(-1, 1), read(video))
    assert float(far[5]) == pytest.approx(10, abs=0.5) and float(far[6]) > 20
    same = torch.ones(24, dtype=torch.bool)
    same[5:7] = False
    assert torch.equal(far[same], own[same])
    seen = read(video)
    others = (replace(seen, shape=Read(name, 1.0)) for name in world.SHAPES)
    nearest = min(others, key=lambda wrong: float(distances(video, wrong).mean()))
    assert nearest.shape.value == shot.scene.shape


def test_what_is_not_read_is_not_drawn() -> None:
    _, video = one_shot(3, "up", 9)
    shown = read(video)
    bare = [replace(shown, shape=Read(None, 0.0)), replace(shown, colour=Read(None, 0.0))]
    assert torch.equal(*(distances(video, each) for each in bare))
    whole, dotless = (
        distances(video, each) for each in (shown, replace(shown, accent=Read(None, 0.0)))
    )
    assert bool((whole < dotless).all() and (dotless < distances(video, bare[0])).all())
    ground = torch.full_like(video, -1)
    assert bool(distances(ground, read(ground)).isfinite().all())


def test_nothing_is_read_from_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    shot, video = one_shot(3, "up", 9)
    ground = world.render([Story((replace(shot, size=1e-3),), (0,), 1, 9)])[0]
    noise = torch.randn(video.shape, generator=generator).clamp(-1, 1)
    blobs = F.interpolate(noise[:, :, ::16, ::16], scale_factor=16.0, mode="bilinear")
    for frames in (ground, torch.zeros_like(video), noise, blobs):
        shown = read(frames)
        assert shown.shape.value is None
        assert not agreement(shown, shot.scene).shape
        assert identity(shown, read(video)).score < 100
    assert read(ground).seen == 0
    assert read(ground).background.value == shot.scene.background


def test_a_shape_that_comes_and_goes_is_counted() -> None:
    _, video = one_shot(4, "right", 12)
    shown = read(torch.cat([video, torch.zeros(4, *video.shape[1:]) + video[:1, :, :1, :1]]))
    assert shown.seen == pytest.approx(12 / 16)


def test_other_frames_are_refused() -> None:
    assert "is not [F, 3, 128, 128]" in refused(read, torch.zeros(9, 3, 64, 64))
    assert "is not [F, 3, 128, 128]" in refused(read, torch.zeros(0, 3, 128, 128))
    assert "NaN" in refused(read, torch.full((9, 3, 128, 128), torch.nan))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_refuses_what_cannot_be() -> None:
    assert "3 hits of 2" in refused(wilson, 3, 2)
    assert "0 hits of 0" in refused(wilson, 0, 0)
