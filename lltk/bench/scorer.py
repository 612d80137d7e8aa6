"""Read the tiny world's attributes back from frames: does a video show what it was asked for?

Backgrounds are nearly grey and shapes are not, so a shape is where the chroma differs from the
background's. Every frame is posed: moved and scaled so that its shape lies in the middle with one
size. Outline and colours of all posed frames together are compared with the world's own. Nothing is
trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.models.tiny.world import (
    ACCENT,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PULSE_DEPTH,
    PULSE_PERIOD,
    RESOLUTION,
    SHAPES,
    Scene,
    paint,
    parse_caption,
    signed_distance,
    stripes,
    wrapped,
)

MOTION_FRAMES = 8
"""With fewer frames no motion is read."""

_REACH = 2.0
"""Half the width of a posed frame, in units of the shape's size."""
_POINTS = 48
"""Points across a posed frame."""
_FAINT = 0.15
"""More chroma than any background has; the world's colours have at least three times as much."""
_FARTHEST = 60.0
"""Pixels from a shape's centre; what lies farther away is background in every frame."""
_UNSEEN = 1e-3
"""A size in pixels at which nothing is to be seen of a shape."""
_SMALLEST = 6.0
"""The smallest size that counts as a shape, in pixels."""
_BLURS = (0.05, 0.12, 0.2, 0.3)
"""Standard deviations of the blurs that are tried, in units of the shape's size."""
_OVERLAP = 0.5
"""The least intersection over union of a shape with what is seen; below it, no shape fits."""
_STILL = 0.75
"""A speed in pixels a frame that is lower than that of anything that moves."""
_TURNING = 0.08
"""Radians a frame; a straight path turns less, and the widest circle turns more (0.157)."""
_STEADY = 0.5
"""The least likeness of a path's turns, from 0 to 1; on a line or a circle all are the same."""
_SWING = 0.03
"""A standard deviation of the size's logarithm; noise makes less, and a pulse makes more."""


@dataclass(frozen=True)
class Read:
    """One attribute as it was read.

    Attributes:
        value: the attribute's name, or None if nothing fits.
        confidence: how much better the value fits than the next best, from 0 to 1.
    """

    value: str | None
    confidence: float


_NOTHING = Read(None, 0.0)


@dataclass(frozen=True, eq=False)
class Reading:
    """What the frames of a shot show.

    Attributes:
        shape, colour, motion, background: what a caption tells.
        accent: the colour of the dot on the shape.
        size: the shape's size in pixels, as `Shot` has it; NaN if no shape was seen.
        tint: the hue of the background, as a fraction of a full turn.
        seen: the share of the frames that show a shape.
        poses: the shape's x, y and size in pixels in each frame, [F, 3]; a frame that shows none
            has a size at which nothing is to be seen.
    """

    shape: Read
    colour: Read
    motion: Read
    background: Read
    accent: Read
    size: float
    tint: float
    seen: float
    poses: Tensor


@dataclass(frozen=True)
class Agreement:
    """Which parts of a caption the frames show."""

    shape: bool
    colour: bool
    motion: bool
    background: bool

    @property
    def score(self) -> float:
        """How many of the four parts the frames show, in per cent."""
        return 25.0 * (self.shape + self.colour + self.motion + self.background)


@dataclass(frozen=True)
class Identity:
    """How alike two stretches of frames are in what no caption tells.

    Attributes:
        size_ratio: the larger size divided by the smaller; NaN if a shape is missing.
        same_accent: whether both accents have the same colour.
        tint_difference: the difference of the hues as a fraction of a turn, at most ½.
    """

    size_ratio: float
    same_accent: bool
    tint_difference: float

    @property
    def score(self) -> float:
        """How many of three things are kept, in per cent.

        They are the size within a tenth, the accent's colour, and the tint within 1/8 of a turn.
        """
        kept = (self.size_ratio < 1.1, self.same_accent, self.tint_difference < 1 / 8)
        return 100 * sum(kept) / len(kept)


def agreement(shown: Reading, wanted: str | Scene) -> Agreement:
    """Compare what a shot's frames show with its caption.

    Args:
        shown: the reading of at least `MOTION_FRAMES` frames.
        wanted: a caption that `parse_caption` can read, or the scene that it describes.
    """
    scene = parse_caption(wanted) if isinstance(wanted, str) else wanted
    return Agreement(
        shape=shown.shape.value == scene.shape,
        colour=shown.colour.value == scene.colour,
        motion=shown.motion.value == scene.motion,
        background=shown.background.value == scene.background,
    )


def identity(first: Reading, second: Reading) -> Identity:
    """Compare two stretches of frames that should be of one shot."""
    tint = abs(first.tint - second.tint)
    return Identity(
        size_ratio=max(first.size / second.size, second.size / first.size),
        same_accent=first.accent.value is not None and first.accent.value == second.accent.value,
        tint_difference=min(tint, 1 - tint),
    )


def read(frames: Tensor) -> Reading:
    """Read what frames of one shot show.

    Args:
        frames: [F, 3, H, W] in [-1, 1] at the world's resolution, on any device. A second or two
            are best: in a longer stretch, changes within it average out.

    Raises:
        ValueError: the frames have another shape, or values that are not finite.
    """
    if frames.shape[1:] != (3, RESOLUTION, RESOLUTION) or len(frames) < 1:
        raise ValueError(
            f"frames: shape {tuple(frames.shape)} is not [F, 3, {RESOLUTION}, {RESOLUTION}]; pass "
            "the frames of one shot at the tiny world's resolution"
        )
    if not bool(frames.isfinite().all()):
        raise ValueError(
            "frames: hold NaN or infinity; see where the model or its decoder diverges"
        )
    image = (frames.float().clamp(-1, 1) + 1) / 2
    cover = _cover(_chroma(image))
    x, y, size = _pose(cover)
    found = size > _SMALLEST
    seen = float(found.float().mean())
    background, tint = _ground(image, x, y, size)
    poses = x.new_tensor([0.0, 0.0, _UNSEEN]).repeat(len(x), 1)
    if not seen:
        return Reading(
            _NOTHING, _NOTHING, _NOTHING, background, _NOTHING, math.nan, tint, seen, poses
        )
    x, y, size = x[found], y[found], size[found]
    shape, outline, scale = _shape(_posed(cover[found, None], x, y, size))
    posed = _posed(image[found], x, y, size)
    poses[found] = torch.stack([x, y, size / scale], 1)
    distance, radius = (part.to(frames.device) for part in _distance(outline, scale))
    return Reading(
        shape=shape,
        colour=_colour(posed, (distance < -0.12) & (radius > ACCENT + 0.12)),
        motion=_motion(x, y, size),
        background=background,
        accent=_colour(posed, radius < ACCENT / 2),
        size=_mean_size(size) / scale,
        tint=tint,
        seen=seen,
        poses=poses,
    )


def distances(frames: Tensor, shown: Reading) -> Tensor:
    """How far frames are from the world's own drawing of what they show.

    What was not read is not drawn: no shape if it or its colour was not, and no dot if its colour
    was not.

    Args:
        frames: as `read` takes them.
        shown: what was read of them.

    Returns:
        The root of the mean square of each frame's difference, in per cent of a channel's range:
        float32 [F].
    """
    shape, colour, poses = shown.shape.value, shown.colour.value, shown.poses.clone()
    if shape is None or colour is None:
        poses[:, 2] = _UNSEEN
        shape, colour = next(iter(SHAPES)), next(iter(COLOURS))
    background = shown.background.value
    assert background is not None  # one is always the nearest
    drawn = paint(poses, shape, colour, shown.accent.value or colour, background, shown.tint)
    return 50 * (frames.float().clamp(-1, 1) - drawn).square().mean((1, 2, 3)).sqrt()


def _chroma(colour: Tensor) -> Tensor:
    """The chroma of colours [..., 3, H, W], a vector in the plane of hues: [..., 2, H, W].

    Grey has none.
    """
    red, green, blue = colour.unbind(-3)
    return torch.stack([red - (green + blue) / 2, math.sqrt(0.75) * (green - blue)], -3)


def _hue(chroma: Tensor) -> Tensor:
    """The angle of chroma [..., 2], as a fraction of a turn."""
    return torch.atan2(chroma[..., 1], chroma[..., 0]) / (2 * math.pi)


def _cover(chroma: Tensor) -> Tensor:
    """How much of each pixel the shape covers, from 0 to 1: [F, H, W].

    At an edge, chroma mixes in proportion to the cover. So the border is where half the shape's
    chroma is, whether it is blurred or not.
    """
    ground = chroma.flatten(2).median(2).values.median(0).values
    smooth = F.avg_pool2d(F.pad(chroma - ground[:, None, None], (1, 1, 1, 1), "circular"), 3, 1)
    far = torch.hypot(*smooth.unbind(1))
    peak = torch.quantile(far.flatten(1), 0.99, dim=1).median()
    inside = far >= 0.4 * peak
    full = far[inside].median().clamp(min=_FAINT)
    return _ramp(far / full)


def _pose(cover: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The shape's x, y and size in pixels, [F] each, from its cover [F, H, W]."""
    area = cover.sum((1, 2))
    pixels = torch.arange(RESOLUTION, device=cover.device) + 0.5
    centres = []
    for profile in (cover.sum(1), cover.sum(2)):
        angle = 2 * math.pi * pixels / RESOLUTION
        turn = torch.atan2((profile * angle.sin()).sum(1), (profile * angle.cos()).sum(1))
        centre = turn * RESOLUTION / (2 * math.pi)
        for _ in range(2):
            offset = wrapped(pixels - centre[:, None])
            centre = centre + (profile * offset).sum(1) / area.clamp(min=1)
        centres.append(centre)
    return centres[0], centres[1], (area / math.pi).sqrt()


def _grid(device: torch.device) -> tuple[Tensor, Tensor]:
    """The points of a posed frame, to the right [1, P] and down [P, 1], in units of the size."""
    line = torch.linspace(-_REACH, _REACH, _POINTS, device=device)
    return line[None], line[:, None]


def _posed(images: Tensor, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Images [F, C, H, W] moved and scaled to one pose of the shape: [F, C, P, P]."""
    right, down = _grid(images.device)
    scale = size[:, None, None]
    place = torch.stack(
        torch.broadcast_tensors(x[:, None, None] + right * scale, y[:, None, None] + down * scale),
        -1,
    )
    wide = F.pad(images, (1, 1, 1, 1), "circular")
    place = torch.remainder(place, RESOLUTION) + 1
    return F.grid_sample(wide, 2 * place / (RESOLUTION + 2) - 1, align_corners=False)


def _shape(cover: Tensor) -> tuple[Read, str, float]:
    """The shape that overlaps posed cover [F, 1, P, P] best, sharp or blurred.

    Returns:
        The shape, if it overlaps enough; the best shape's name in any case; and by what factor its
        size was overestimated.
    """
    mean = cover.mean((0, 1))
    overlaps: dict[str, tuple[float, float]] = {}
    for name in SHAPES:
        fitted = [_template(name, blur) for blur in _BLURS]
        ideal = torch.stack([template for template, _ in fitted]).to(cover.device)
        shared = torch.minimum(ideal, mean).sum((1, 2)) / torch.maximum(ideal, mean).sum((1, 2))
        scales = (scale for _, scale in fitted)
        overlaps[name] = max(zip(shared.tolist(), scales, strict=True))
    best = _nearest({name: 1 - overlap for name, (overlap, _) in overlaps.items()})
    assert best.value is not None
    overlap, scale = overlaps[best.value]
    return best if overlap > _OVERLAP else _NOTHING, best.value, scale


@cache
def _template(shape: str, blur: float) -> tuple[Tensor, float]:
    """The posed cover, [P, P], that `_cover` and `_pose` make of a blurred shape.

    A blurred shape may cover more than its own area, and is then taken for a larger one. The second
    result is the factor. ``blur`` is the standard deviation in units of the size.
    """
    right, down = _grid(torch.device("cpu"))
    step = 2 * _REACH / (_POINTS - 1)
    scale = 1.0
    for _ in range(3):
        distance, _radius = _distance(shape, scale)
        weights = torch.exp(-((scale * (right - down) / blur) ** 2) / 2)
        weights /= weights.sum(1, keepdim=True)
        sharp = (0.5 - distance / (step * scale)).clamp(0, 1)
        cover = _ramp(weights @ sharp @ weights.T)
        scale *= math.sqrt(float(cover.sum()) * step**2 / math.pi)
    return cover, scale


def _ramp(share: Tensor) -> Tensor:
    """Cover from the share of the shape's chroma; noise is cut off, the border stays at half."""
    return ((share - 0.25) * 2).clamp(0, 1)


def _distance(shape: str, scale: float) -> tuple[Tensor, Tensor]:
    """How far a posed frame's points are from a shape's outline and centre, [P, P] each.

    ``scale`` enlarges the posed frame first.
    """
    right, down = _grid(torch.device("cpu"))
    outline = SHAPES[shape]
    numbers = (outline.fold, outline.turn, *outline.lines[0], *outline.lines[1])
    values = [torch.tensor(float(number)) for number in numbers]
    return signed_distance(right * scale, down * scale, *values)


def _nearest(distances: Mapping[str, float]) -> Read:
    """The nearest name. The confidence is 1 − d₁ / d₂ for the two smallest distances."""
    first, second = sorted(distances, key=lambda name: distances[name])[:2]
    return Read(first, 1 - distances[first] / max(distances[second], 1e-9))


def _colour(posed: Tensor, where: Tensor) -> Read:
    """The colour of the world whose hue is nearest to that of posed images [F, 3, P, P].

    ``where``, bool [P, P], marks the points that count.
    """
    middle = posed[:, :, where].transpose(0, 1).flatten(1).median(1).values
    chroma = _chroma(middle[:, None, None]).flatten()
    if float(chroma.norm()) < _FAINT:
        return _NOTHING
    own = float(_hue(chroma))
    palette = torch.tensor(list(COLOURS.values()))[:, :, None, None]
    hues = _hue(_chroma(palette).flatten(1)).tolist()
    return _nearest(
        {name: abs((own - hue + 0.5) % 1 - 0.5) for name, hue in zip(COLOURS, hues, strict=True)}
    )


def _ground(image: Tensor, x: Tensor, y: Tensor, size: Tensor) -> tuple[Read, float]:
    """The kind of background, and the hue of its tint as a fraction of a turn."""
    pixels = torch.arange(RESOLUTION, device=image.device) + 0.5
    right = wrapped(pixels - x[:, None])[:, None]
    down = wrapped(pixels - y[:, None])[:, :, None]
    outside = torch.hypot(right, down) > (1.8 * size).clamp(max=_FARTHEST)[:, None, None]
    stripe = stripes(image.device).expand(len(image), -1, -1)
    bands = [_mean_where(image, outside & half) for half in (stripe < 0.5, stripe > 0.5)]
    tint = float(_hue(_chroma((bands[0] + bands[1])[:, None, None]).flatten())) % 1
    low, high = (float(band.mean()) for band in bands)
    # Contrast counts more than brightness, so that a flat grey is not taken for stripes.
    kinds = {
        name: math.hypot(low + high - a - b, 4 * (high - low - b + a))
        for name, (a, b) in BACKGROUNDS.items()
    }
    return _nearest(kinds), tint


def _mean_where(image: Tensor, marked: Tensor) -> Tensor:
    """The mean colour, [3], of the points of images [F, 3, H, W] that are marked, [F, H, W]."""
    weights = marked.to(image.dtype).flatten(1)[:, :, None]
    return (image.flatten(2) @ weights).sum((0, 2)) / weights.sum()


def _motion(x: Tensor, y: Tensor, size: Tensor) -> Read:
    """How the shape moves, from its place and size in consecutive frames, [F] each."""
    if len(x) < MOTION_FRAMES:
        return _NOTHING
    steps = torch.complex(wrapped(x.diff()), wrapped(y.diff())).to(torch.complex128)
    lag = min(4, len(x) // 3)
    moves = steps.unfold(0, lag, 1).mean(1)
    speed = float(moves.abs().median())
    swing = float(size.log().std())
    if speed < _STILL:
        return Read("pulsing", 1 - speed / _STILL) if swing > _SWING else _NOTHING
    turning = moves[:-lag].conj() * moves[lag:]
    if float(turning.sum().abs() / turning.abs().sum()) < _STEADY:
        return _NOTHING
    turn = abs(float(turning.sum().angle())) / lag
    if turn > _TURNING:
        return Read("circling", 1 - _TURNING / turn)
    mean = moves.mean()
    away = {
        name: abs(float((mean * complex(*step).conjugate()).angle()))
        for name, step in DIRECTIONS.items()
    }
    return _nearest(away)


def _mean_size(size: Tensor) -> float:
    """The size in pixels from sizes [F]; if they pulse, the size about which they swing.

    A pulse of the world's depth and period is fitted to each period's frames, with the best phase.
    """
    if float(size.log().std(correction=0)) < _SWING:
        return float(size.median())
    angles = 2 * math.pi * torch.arange(PULSE_PERIOD, device=size.device) / PULSE_PERIOD
    waves = 1 + PULSE_DEPTH * (angles[:, None] + angles).sin()
    fitted = []
    for part in size.split(PULSE_PERIOD):
        wave = waves[:, : len(part)]
        scale = (wave * part).sum(1) / wave.square().sum(1)
        error = (scale[:, None] * wave - part).square().sum(1)
        fitted.append((len(part), float(scale[error.argmin()])))
    longest = max(length for length, _ in fitted)
    return median(scale for length, scale in fitted if length == longest)
