"""Which frames of a sample's clips fill its chunks, as LongLive-2.0 has it. Reads no file.

A sample is a row of clips, its shots in order. A chunk takes consecutive frames of one clip, at the
sample's frame rate. The next chunk goes on where it ended, as long as the clip lasts, and then at
the beginning of the next clip that holds a whole chunk. That opens a new shot.

Times are exact: frames per second are fractions. A time half-way between two frames means the even
one, as Python rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lltk.stream.script import SCENE_CUT

_STARTS = 50
"""Into how many parts the places are divided at which a sample may begin in a clip."""


@dataclass(frozen=True)
class Shot:
    """A clip of a sample.

    Attributes:
        fps: its frames a second.
        frames: how many it has.
        caption: what it shows.
    """

    fps: Fraction
    frames: int
    caption: str


@dataclass(frozen=True)
class Rules:
    """How clips are put together.

    Attributes:
        chunk: latent frames in a chunk.
        chunks: chunks in a sample.
        fps: a sample's frames a second.
        stride: video frames in a latent frame.
        max_chunks_per_shot: after so many chunks of one clip a second of it is left out, and what
            follows is a new shot with the same caption. 0: never.
        allow_padding: whether a sample that its clips do not fill ends with padding.
        min_latent_frames: the least that a sample has before its padding, where that is allowed.
        single_clip: whether a sample has one clip only.
    """

    chunk: int
    chunks: int
    fps: Fraction = Fraction(24)
    stride: int = 4
    max_chunks_per_shot: int = 0
    allow_padding: bool = False
    min_latent_frames: int = 0
    single_clip: bool = False

    def frames(self, chunk: int) -> int:
        """The video frames that the sample's chunk of this number takes."""
        return self.stride * self.chunk - (0 if chunk else self.stride - 1)


@dataclass(frozen=True)
class Chunk:
    """A chunk of a sample.

    Attributes:
        clip: the number of its clip among those of the sample.
        frames: the numbers of its frames in that clip; none is below the one before it.
        prompt: the clip's caption; the scene-cut prefix precedes it where the chunk opens a shot
            that is not the first.
        opens: whether it opens a shot.
    """

    clip: int
    frames: tuple[int, ...]
    prompt: str
    opens: bool


@dataclass(frozen=True)
class Assembly:
    """A whole sample.

    Attributes:
        chunks: all of them. Padding repeats the last frame and the last prompt, prefix included.
        valid: how many of its latent frames are no padding.
    """

    chunks: tuple[Chunk, ...]
    valid: int


@dataclass(frozen=True)
class _Place:
    """Where a chunk is: its clip, its first frame, and whether it opens a shot."""

    clip: int
    frame: int
    opens: bool


class Unfilled(ValueError):
    """Clips fill no sample; the message says why."""


def place_of(name: str) -> tuple[bool, int, str]:
    """By what clips are ordered: rising numbers, and then by name what is no number.

    Args:
        name: of the clip's file, without its suffix.
    """
    try:
        return (False, int(name), name)
    except ValueError:
        return (True, 0, name)


def assemble(shots: Sequence[Shot], rules: Rules, start: tuple[int, int] = (0, 0)) -> Assembly:
    """Fill a sample's chunks.

    Args:
        shots: the sample's clips that have a caption, in order.
        rules: how they are put together.
        start: the clip at which the sample begins, and the number of its first frame. If the first
            chunk does not fit there, it is at the beginning of the next clip in which it does.

    Raises:
        Unfilled: there is too little video.
    """
    places = list(_places(shots, rules, start))
    _check(shots, rules, places)
    chunks: list[Chunk] = []
    for number, place in enumerate(places):
        shot, length = shots[place.clip], rules.frames(number)
        frames = tuple(_frame(shot, rules, place.frame, offset) for offset in range(length))
        prompt = (SCENE_CUT if place.opens and number else "") + shot.caption
        chunks.append(Chunk(place.clip, frames, prompt, place.opens))
    for number in range(len(chunks), rules.chunks):
        last = chunks[-1]
        frames = last.frames[-1:] * rules.frames(number)
        chunks.append(Chunk(last.clip, frames, last.prompt, opens=False))
    return Assembly(tuple(chunks), len(places) * rules.chunk)


def starts(shots: Sequence[Shot], rules: Rules) -> list[tuple[int, int]]:
    """Where a sample without padding may begin: clips, and the numbers of their frames.

    A clip has up to 100 such places, at equal distances.

    Args:
        shots, rules: as for `assemble`.
    """
    found = []
    for clip, shot in enumerate(shots):
        first = (rules.frames(0) - 1) * shot.fps / rules.fps
        last = math.floor(shot.frames - Fraction(1, 2) - first)
        for frame in range(0, last + 1, max(1, last // _STARTS)):
            places = list(_places(shots, rules, (clip, frame)))
            if len(places) == rules.chunks and (places[0].clip, places[0].frame) == (clip, frame):
                found.append((clip, frame))
    return found


def first_usable(asked: int, usable: Sequence[bool]) -> int | None:
    """The first usable one of a row from a number on, going on at the front; None if none is."""
    row = (*range(asked, len(usable)), *range(asked))
    return next((number for number in row if usable[number]), None)


def _places(shots: Sequence[Shot], rules: Rules, start: tuple[int, int]) -> Iterator[_Place]:
    """Where the chunks are, until the sample or its clips are at an end."""
    clip, frame = start
    since_cut = 0
    for number in range(rules.chunks):
        length = rules.frames(number)
        cut = 0 < rules.max_chunks_per_shot <= since_cut
        begin = frame + (round(shots[clip].fps) if cut else 0)
        last = clip + 1 if rules.single_clip else len(shots)
        candidates = [(clip, begin), *((later, 0) for later in range(clip + 1, last))]
        room = next((place for place in candidates if _fits(shots, rules, place, length)), None)
        if room is None:
            return
        opens = number == 0 or cut or room[0] != clip
        clip, frame = room
        yield _Place(clip, frame, opens)
        since_cut = 1 if opens else since_cut + 1
        frame = _frame(shots[clip], rules, frame, length)


def _fits(shots: Sequence[Shot], rules: Rules, place: tuple[int, int], length: int) -> bool:
    clip, frame = place
    return clip < len(shots) and _frame(shots[clip], rules, frame, length - 1) < shots[clip].frames


def _frame(shot: Shot, rules: Rules, begin: int, offset: int) -> int:
    """The clip's frame that is nearest so many frames of the sample after another."""
    return round(begin + offset * shot.fps / rules.fps)


def _check(shots: Sequence[Shot], rules: Rules, places: Sequence[_Place]) -> None:
    """Refuse what is no sample.

    LongLive refuses a single clip that ends with a chunk also where padding is allowed.
    """
    filled, valid = len(places), len(places) * rules.chunk
    if not shots:
        raise Unfilled("no clip has a caption")
    if not places:
        which = "the first clip" if rules.single_clip else "every clip"
        raise Unfilled(f"{which} is too short for the first chunk")
    if rules.single_clip and filled < rules.chunks:
        last, length = places[-1], rules.frames(filled - 1)
        if _frame(shots[last.clip], rules, last.frame, length) >= shots[last.clip].frames:
            raise Unfilled(f"the clip ends with chunk {filled} of {rules.chunks}")
    if filled < rules.chunks and not rules.allow_padding:
        raise Unfilled(f"the clips fill {filled} of {rules.chunks} chunks")
    if rules.allow_padding and valid < rules.min_latent_frames:
        raise Unfilled(
            f"the clips fill {valid} latent frames, fewer than the {rules.min_latent_frames} of "
            "min_latent_frames"
        )
