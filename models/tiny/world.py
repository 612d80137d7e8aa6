"""The tiny world: videos of several shots, each with one moving shape and a caption.

A caption says what a `Scene` holds. Size, accent and tint are the shot's identity: no caption tells
them, so whoever continues a shot must remember them. The frame is a torus: what leaves it on one
side enters on the other, so a shape can move left for ever and is always wholly visible. A shot
begins with its shape near the middle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

RESOLUTION = 128
"""Height and width of a frame in pixels."""
FPS = 16
STRIDE = 4
"""Video frames of a latent frame; the first latent frame of a video is one video frame."""

TINT = 0.06
"""How far a background's tint lies from grey, in RGB of [0, 1]."""
ACCENT = 0.45
"""Radius of the accent dot, as a share of the shape's size."""
STRIPE_PERIOD = 32
"""How often stripes repeat, in pixels along x + y; a divisor of the resolution."""
PULSE_DEPTH = 0.25
"""By which share of its size a pulsing shape grows and shrinks."""
PULSE_PERIOD = 24
"""Frames of a pulse."""
ORBIT = 20.0
"""Radius of a circling shape's way, in pixels."""

_SIZES = (14.0, 24.0)
_SPEEDS = (1.5, 2.5)
_ORBIT_PERIODS = (28.0, 40.0)
_BLOCK = 64
"""Frames that are rendered at once, so that a CPU's cache holds them."""


@dataclass(frozen=True)
class Outline:
    """A shape with the symmetry of an n-gon. Its area is π, as that of a disc of radius 1.

    A point is mirrored into one of the shape's 2n sectors, where it is (u, v), with u along the
    sector's first edge. It is inside if a·u + b·v < c for each of two lines (a, b, c).

    Attributes:
        fold: n.
        turn: angle of the first sector's edge from straight up, clockwise.
        lines: (a, b, c) twice, with a² + b² = 1.
    """

    fold: int
    turn: float
    lines: tuple[tuple[float, float, float], tuple[float, float, float]]


def _star(points: int, inner: float, turn: float = 0.0) -> Outline:
    """A star whose inner corners lie `inner` times as far from its centre as its points.

    It consists of 2n triangles, so its area is n · outer · inner · sin(π/n).
    """
    half = math.pi / points
    outer = math.sqrt(math.pi / (points * inner * math.sin(half)))
    x, y = outer * inner * math.cos(half), outer * inner * math.sin(half)
    length = math.hypot(y, outer - x)
    line = (y / length, (outer - x) / length, outer * y / length)
    return Outline(points, turn, (line, line))


def _cross(width: float) -> Outline:
    """Two bars across each other; their length is 2 and their width 2·`width`, before scaling."""
    scale = math.sqrt(math.pi / (8 * width - 4 * width**2))
    return Outline(4, 0.0, ((1.0, 0.0, scale), (0.0, 1.0, scale * width)))


SHAPES: Mapping[str, Outline] = MappingProxyType(
    {
        "circle": _star(64, math.cos(math.pi / 64)),
        "square": _star(4, math.cos(math.pi / 4), turn=math.pi / 4),
        "triangle": _star(3, math.cos(math.pi / 3)),
        "star": _star(5, 0.5),
        "cross": _cross(0.35),
    }
)
COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "red": (0.85, 0.08, 0.10),
        "orange": (0.98, 0.50, 0.05),
        "yellow": (0.95, 0.92, 0.10),
        "green": (0.10, 0.62, 0.15),
        "cyan": (0.10, 0.80, 0.88),
        "blue": (0.12, 0.22, 0.90),
        "magenta": (0.85, 0.15, 0.80),
    }
)
"""RGB in [0, 1]."""
BACKGROUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"dark": (0.13, 0.13), "light": (0.84, 0.84), "striped": (0.32, 0.54)}
)
"""Grey levels in [0, 1] of the two kinds of stripe."""
DIRECTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
)
"""(x, y), with y downwards."""
MOTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "left": ("moving left", "drifting left"),
        "right": ("moving right", "drifting right"),
        "up": ("moving up", "rising"),
        "down": ("moving down", "sinking"),
        "circling": ("circling", "moving in circles"),
        "pulsing": ("pulsing", "growing and shrinking"),
    }
)
"""What a motion is called in captions."""
_TEMPLATES = (
    "{a} {colour} {shape} {motion} on a {background} background",
    "{a} {colour} {shape} is {motion} on a {background} background",
    "on a {background} background, {a} {colour} {shape} {motion}",
)
_MOTION_WORDS: Mapping[str, str] = MappingProxyType(
    {
        word: motion
        for motion, phrases in MOTIONS.items()
        for phrase in phrases
        for word in phrase.split()
        if word not in ("moving", "drifting", "in", "and")
    }
)
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        word
        for text in (
            *(re.sub(r"\{.*?\}", "", template) for template in _TEMPLATES),
            *("an", *COLOURS, *SHAPES, *BACKGROUNDS),
            *(phrase for phrases in MOTIONS.values() for phrase in phrases),
        )
        for word in re.findall(r"\w+|,", text)
    )
)
"""Every word and punctuation mark of the captions."""


@dataclass(frozen=True)
class Scene:
    """What a caption says.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        motion: one of `MOTIONS`.
        background: one of `BACKGROUNDS`.
    """

    shape: str
    colour: str
    motion: str
    background: str


@dataclass(frozen=True)
class Shot:
    """One shot: its scene, its identity, and where its shape is.

    Attributes:
        scene: what the caption tells.
        caption: the scene in words.
        size: radius in pixels of the disc of the shape's area (its mean where it pulses).
        accent: colour of the dot on the shape, one of `COLOURS`.
        tint: hue of the background, in turns.
        centre: (x, y) in pixels, of the shape at first, or of its orbit.
        rate: pixels a frame where the shape moves straight on, else turns of its phase a frame.
        phase: where the shape is on its orbit or in its pulse at first, in turns.
    """

    scene: Scene
    caption: str
    size: float
    accent: str
    tint: float
    centre: tuple[float, float]
    rate: float
    phase: float


@dataclass(frozen=True)
class Story:
    """Consecutive shots.

    Attributes:
        shots: at least one.
        opens: the chunk that each shot begins with; the first is 0.
        chunk: C, latent frames a chunk.
        frames: video frames, 4·C·n − 3 for n chunks.
    """

    shots: tuple[Shot, ...]
    opens: tuple[int, ...]
    chunk: int
    frames: int

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions, one for each shot."""
        return tuple(shot.caption for shot in self.shots)

    @property
    def starts(self) -> tuple[int, ...]:
        """The video frame that each shot begins with."""
        return tuple(max(0, STRIDE * self.chunk * chunk - STRIDE + 1) for chunk in self.opens)

    @property
    def spans(self) -> tuple[slice, ...]:
        """Each shot's video frames."""
        ends = (*self.starts[1:], self.frames)
        return tuple(slice(*span) for span in zip(self.starts, ends, strict=True))

    @property
    def shot_of_chunk(self) -> tuple[int, ...]:
        """For each chunk the index of its shot."""
        chunks = (self.frames + STRIDE - 1) // (STRIDE * self.chunk)
        return tuple(sum(opening <= chunk for opening in self.opens) - 1 for chunk in range(chunks))

    def prompts(self, scene_cut: str) -> list[str]:
        """For each chunk its shot's caption, after ``scene_cut`` where a later shot opens."""
        return [
            (scene_cut if chunk in self.opens[1:] else "") + self.captions[shot]
            for chunk, shot in enumerate(self.shot_of_chunk)
        ]


@dataclass(frozen=True)
class Clip:
    """A rendered story.

    Attributes:
        video: float32 [F, 3, H, W] in [-1, 1].
        story: its shots.
    """

    video: Tensor
    story: Story


def draw_shot(generator: torch.Generator) -> Shot:
    """Draw a shot. Every attribute is uniform over its values.

    Args:
        generator: on the CPU.
    """
    draws = iter(torch.rand(13, generator=generator, dtype=torch.float64).tolist())

    def choice(options: Sequence[str]) -> str:
        return options[int(next(draws) * len(options))]

    def between(low: float, high: float) -> float:
        return low + next(draws) * (high - low)

    scene = Scene(
        choice(list(SHAPES)),
        choice(list(COLOURS)),
        choice(list(MOTIONS)),
        choice(list(BACKGROUNDS)),
    )
    # How far from the middle of the frame, so that what turns or pulses stays clear of the border.
    reach = {"circling": 6.0}.get(scene.motion, 16.0)
    middle = RESOLUTION / 2
    rates = {"circling": (-1.0, 1.0), "pulsing": (1.0, 1.0)}.get(scene.motion, _SPEEDS)
    caption, size = _say(scene, next(draws), next(draws)), between(*_SIZES)
    accent = choice([colour for colour in COLOURS if colour != scene.colour])
    tint = next(draws)
    centre = (between(middle - reach, middle + reach), between(middle - reach, middle + reach))
    rate, phase = between(*rates), next(draws)
    if scene.motion == "circling":
        low, high = _ORBIT_PERIODS
        rate = math.copysign(1 / (low + abs(rate) * (high - low)), rate)
    elif scene.motion == "pulsing":
        rate = 1 / PULSE_PERIOD
    return Shot(scene, caption, size, accent, tint, centre, rate, phase)


def _say(scene: Scene, template: float, phrase: float) -> str:
    """A caption; two numbers in [0, 1) choose its form."""
    phrases = MOTIONS[scene.motion]
    return _TEMPLATES[int(template * len(_TEMPLATES))].format(
        a="an" if scene.colour[0] in "aeiou" else "a",
        colour=scene.colour,
        shape=scene.shape,
        motion=phrases[int(phrase * len(phrases))],
        background=scene.background,
    )


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes. Other words, as those of a scene-cut prefix, are ignored.

    Raises:
        ValueError: it names no colour, shape, motion or background, or two of one.
    """
    words = re.findall(r"\w+", caption.lower())
    tables: dict[str, Mapping[str, str]] = {
        "shape": {name: name for name in SHAPES},
        "colour": {name: name for name in COLOURS},
        "motion": _MOTION_WORDS,
        "background": {name: name for name in BACKGROUNDS},
    }
    found = {}
    for part, table in tables.items():
        named = {table[word] for word in words if word in table}
        if len(named) != 1:
            what = f"{' and '.join(sorted(named))}" if named else "none"
            raise ValueError(
                f"caption {caption!r}: names {what} as its {part}; name exactly one of "
                f"{', '.join(table)}"
            )
        found[part] = named.pop()
    return Scene(**found)


def draw_story(generator: torch.Generator, frames: int, shots: int, chunk: int) -> Story:
    """Draw a story. Its shots begin with chunks, and where they begin is uniform.

    Args:
        generator: on the CPU.
        frames: video frames, 4·C·n − 3.
        shots: how many, at most one for each chunk.
        chunk: C, the latent frames of a chunk. It has 4·C video frames, and the first 4·C − 3.

    Raises:
        ValueError: the frames are no whole number of chunks, or too few for the shots.
    """
    unit = STRIDE * chunk
    chunks, rest = divmod(frames + STRIDE - 1, unit)
    if rest or chunks < 1:
        near = [unit * n - STRIDE + 1 for n in (chunks, chunks + 1) if n > 0]
        raise ValueError(
            f"frames: {frames} is not a whole number of chunks of {chunk} latent frames; the "
            f"nearest that fit: {' and '.join(map(str, near))}"
        )
    if not 1 <= shots <= chunks:
        raise ValueError(
            f"shots: {shots} do not fit into {frames} frames; use 1 to {chunks} (one a chunk), or "
            "more frames"
        )
    cuts = torch.randperm(chunks - 1, generator=generator)[: shots - 1] + 1
    opens = (0, *sorted(cuts.tolist()))
    return Story(tuple(draw_shot(generator) for _ in opens), opens, chunk, frames)


def sample_clip(
    generator: torch.Generator,
    frames: int,
    shots: int,
    chunk: int,
    device: torch.device | str = "cpu",
) -> Clip:
    """A story and its video; arguments and errors as `draw_story`'s."""
    story = draw_story(generator, frames, shots, chunk)
    return Clip(render([story], device)[0], story)


def render(stories: Sequence[Story], device: torch.device | str = "cpu") -> Tensor:
    """Videos of stories of one length.

    Returns:
        float32 [B, F, 3, H, W] in [-1, 1].
    """
    spans = [(shot, span) for story in stories for shot, span in _timeline(story)]
    lengths = torch.tensor([span.stop - span.start for _, span in spans])
    shots = torch.tensor([_row(shot) for shot, _ in spans], dtype=torch.float64)
    rows = shots.repeat_interleave(lengths, 0)
    time = torch.cat([torch.arange(length, dtype=torch.float64) for length in lengths])
    table = torch.cat([_pose(rows[:, :9], time), rows[:, 9:]], 1).float().to(device)
    video = torch.empty(len(table), 3, RESOLUTION, RESOLUTION, device=device)
    for block, out in zip(table.split(_BLOCK), video.split(_BLOCK), strict=True):
        out.copy_(_paint(block))
    return video.unflatten(0, (len(stories), -1))


def _timeline(story: Story) -> list[tuple[Shot, slice]]:
    return list(zip(story.shots, story.spans, strict=True))


def paint(
    poses: Tensor, shape: str, colour: str, accent: str, background: str, tint: float
) -> Tensor:
    """Frames of one look.

    Args:
        poses: the shape's x, y and size in pixels, float32 [F, 3].
        shape, colour, accent, background, tint: as `Scene` and `Shot` have them.

    Returns:
        float32 [F, 3, H, W] in [-1, 1].
    """
    look = poses.new_tensor(_look(shape, colour, accent, background, tint))
    return _paint(torch.cat([poses, look.expand(len(poses), -1)], 1))


def _row(shot: Shot) -> list[float]:
    """A shot in numbers: what `_pose` reads (9), then what `_paint` reads (19)."""
    scene = shot.scene
    step = DIRECTIONS.get(scene.motion, (0, 0))
    return [
        *shot.centre,
        *(shot.rate * part for part in step),
        ORBIT * (scene.motion == "circling"),
        shot.size,
        PULSE_DEPTH * (scene.motion == "pulsing"),
        shot.rate,
        shot.phase,
        *_look(scene.shape, scene.colour, shot.accent, scene.background, shot.tint),
    ]


def _look(shape: str, colour: str, accent: str, background: str, tint: float) -> list[float]:
    """A look in numbers: outline (8), colours (6), ground (5)."""
    outline = SHAPES[shape]
    wave = [math.cos(2 * math.pi * (tint - third / 3)) for third in range(3)]
    return [
        *(outline.fold, outline.turn, *outline.lines[0], *outline.lines[1]),
        *COLOURS[colour],
        *COLOURS[accent],
        *(TINT * part for part in wave),
        *BACKGROUNDS[background],
    ]


def _pose(shots: Tensor, time: Tensor) -> Tensor:
    """The shape's x, y and size in pixels [N, 3] at times in frames [N]."""
    x, y, right, down, orbit, size, depth, rate, phase = shots.unbind(1)
    angle = 2 * math.pi * (phase + rate * time)
    return torch.stack(
        [
            x + right * time + orbit * angle.cos(),
            y + down * time + orbit * angle.sin(),
            size * (1 + depth * angle.sin()),
        ],
        1,
    )


def _paint(frames: Tensor) -> Tensor:
    """Frames [N, 3, H, W] from their numbers: pose (3), outline (8), colours (6), ground (5)."""
    x, y, size = frames[:, :3, None, None].unbind(1)
    outline = frames[:, 3:11, None, None].unbind(1)
    colour, accent, tint = frames[:, 11:20, None, None].split(3, 1)
    bands = frames[:, 20:22, None, None]
    pixels = torch.arange(RESOLUTION, device=frames.device) + 0.5
    right, down = wrapped(pixels[None, None] - x), wrapped(pixels[None, :, None] - y)
    distance, radius = signed_distance(right / size, down / size, *outline)
    cover = (0.5 - distance * size).clamp(0, 1)[:, None]
    dot = (0.5 + (ACCENT - radius) * size).clamp(0, 1)[:, None]
    stripe = stripes(frames.device)
    ground = tint + torch.lerp(bands[:, :1], bands[:, 1:], stripe)
    return torch.lerp(ground, torch.lerp(colour, accent, dot), cover) * 2 - 1


def wrapped(offset: Tensor) -> Tensor:
    """The shortest way round the torus, in pixels, in [-64, 64)."""
    half = RESOLUTION / 2
    return torch.remainder(offset + half, RESOLUTION) - half


def stripes(device: torch.device | str = "cpu") -> Tensor:
    """Which stripe a pixel is in, 0 to 1, antialiased: [H, W]."""
    along = torch.arange(RESOLUTION, device=device) + 0.5
    diagonal = along[None] + along[:, None]
    quarter = STRIPE_PERIOD / 4
    edge = (torch.remainder(diagonal, STRIPE_PERIOD) - 2 * quarter).abs() - quarter
    return (0.5 + edge / math.sqrt(2)).clamp(0, 1)


def signed_distance(
    right: Tensor,
    down: Tensor,
    fold: Tensor,
    turn: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    a2: Tensor,
    b2: Tensor,
    c2: Tensor,
) -> tuple[Tensor, Tensor]:
    """Distance to an `Outline`, negative inside. Near it, distances are exact but at corners.

    Args:
        right, down: from the shape's centre, in sizes; broadcast against each other and the rest.
        fold, turn, a, b, c, a2, b2, c2: the outline's numbers.

    Returns:
        The distance to the outline, and that to the centre.
    """
    radius = torch.hypot(right, down)
    sector = math.pi / fold
    angle = torch.remainder(torch.atan2(right, -down) - turn + sector, 2 * sector) - sector
    u, v = radius * angle.cos(), radius * angle.sin().abs()
    return torch.maximum(a * u + b * v - c, a2 * u + b2 * v - c2), radius
