"""A folder of captioned clips, each one shot, cut into samples of whole chunks.

::

    video/<sample>/<number>.mp4       the shots of one sample, in the order of their numbers
    caption/<sample>/<number>.json    {"caption": "…"}
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from lltk.files.reading import read_json
from lltk.graph.geometry import Geometry
from lltk.stream.script import SCENE_CUT
from lltk.train.data import generator_at
from lltk.train.frames import Unusable, last_time, nearest_frames

_TRIES = 100
"""How many places are tried for a sample before the folder is taken to be damaged."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A video of one shot that can be read.

    Attributes:
        path: the video file.
        caption: what it shows.
        until: the time until which its last frame is the nearest, in seconds from its first frame.
    """

    path: Path
    caption: str
    until: Fraction


@dataclass(frozen=True)
class Span:
    """Consecutive chunks of one clip.

    Attributes:
        clip: where they are from.
        start: the first of their frames, counted at the samples' frame rate.
        frames: the number of these frames.
        chunks: the number of chunks.
    """

    clip: Clip
    start: int
    frames: int
    chunks: int


@dataclass(frozen=True)
class Sample:
    """A video of whole chunks.

    Attributes:
        video: uint8 [F, H, W, 3], RGB.
        prompts: one for each chunk. The scene-cut prefix precedes it in the first chunk of every
            shot but the first.
        opens: for each chunk, whether it opens a shot.
    """

    video: Tensor
    prompts: tuple[str, ...]
    opens: tuple[bool, ...]


class FolderClips:
    """Samples from a folder of clips.

    A sample begins at some frame of a clip and goes on with the clips after it, each of which is a
    new shot. It begins at any place from which it can be filled, all equally likely. A chunk lies
    in one clip: frames at a clip's end that do not fill a chunk are dropped. With chunks of C
    latent frames, a sample's first chunk takes stride·C − stride + 1 video frames and each further
    one stride·C.

    The frames are those nearest in time. They are resized to cover the geometry's height and width,
    and cropped about their centre.

    A clip that is damaged, too short or without a caption is skipped. Some damage shows only when a
    frame is read. Then another place is drawn for the sample; which one follows from the sample's
    number and the files alone.

    Args:
        folder: holds ``video`` and ``caption``.
        geometry: has chunk, latent frames, height and width of a sample.
        fps: video frames a second at which the clips are read.
        shots: most clips in a sample.
        stride: video frames in a latent frame.

    Raises:
        ValueError: there is no such folder, or no sample can be filled; says what was skipped.
    """

    def __init__(
        self, folder: Path, geometry: Geometry, fps: float, shots: int, stride: int = 4
    ) -> None:
        if not (folder / "video").is_dir():
            raise ValueError(
                f"{folder}: has no video/; lay it out as video/<sample>/<number>.mp4 with "
                "caption/<sample>/<number>.json"
            )
        self._folder = folder
        self._geometry = geometry
        self._fps = Fraction(fps).limit_denominator(1001)
        self._stride = stride
        self.skipped: dict[Path, str] = {}
        """The clips that were left out, wholly or in part, and why."""
        self._places: list[tuple[Sequence[Clip], int]] = []
        counts = []
        for clips in self._samples():
            for first in range(len(clips)):
                tail = clips[first : first + shots]
                if (starts := self._starts(tail)) > 0:
                    self._places.append((tail, starts))
                    counts.append(starts)
        if not self._places:
            raise ValueError(
                f"{folder}: no sample of {geometry.chunks} chunks of {geometry.chunk} latent "
                f"frames at {float(self._fps):g} fps and at most {shots} shots can be filled; add "
                f"longer clips, or lower geometry.frames{self._listed()}"
            )
        self._ends = list(accumulate(counts))
        if self.skipped:
            _log.warning("%s: %d clips skipped", folder, len(self.skipped))

    def sample(self, seed: int, index: int) -> Sample:
        """The sample of a number. It follows from the arguments and the files alone.

        Raises:
            ValueError: none of the places that were tried can be read.
        """
        generator = generator_at(seed, "place", index)
        for _ in range(_TRIES):
            at = int(torch.randint(self._ends[-1], (), generator=generator))
            place = bisect_right(self._ends, at)
            clips, starts = self._places[place]
            spans = list(self._spans(clips, at - self._ends[place] + starts))
            try:
                video = torch.cat([self._read(span) for span in spans])
                return Sample(video, _prompts(spans), _opens(spans))
            except Unusable as error:
                _log.info("sample %d: %s; another place is drawn", index, error)
        raise ValueError(
            f"{self._folder}: no sample can be read in {_TRIES} places; replace the damaged clips"
            f"{self._listed()}"
        )

    def _samples(self) -> Iterator[list[Clip]]:
        """The usable clips of each sample's folder, in the order of their numbers."""
        for folder in sorted(path for path in (self._folder / "video").iterdir() if path.is_dir()):
            found = sorted(folder.glob("*.mp4"))
            numbered = [path for path in found if path.stem.isdecimal()]
            for path in found:
                if path not in numbered:
                    self._skip(path, "its name is not a number")
            clips = []
            for path in sorted(numbered, key=lambda path: int(path.stem)):
                try:
                    clips.append(self._clip(path))
                except Unusable as error:
                    self._skip(path, str(error))
            yield clips

    def _clip(self, path: Path) -> Clip:
        caption = _caption(self._folder / "caption" / path.parent.name / f"{path.stem}.json")
        clip = Clip(path, caption, last_time(path))
        if (length := self._length(clip)) < self._frames(0):
            raise Unusable(
                f"too short: {length} frames at {float(self._fps):g} fps, but a first chunk takes "
                f"{self._frames(0)}"
            )
        return clip

    def _skip(self, path: Path, reason: str) -> None:
        if path not in self.skipped:
            self.skipped[path] = reason
            _log.warning("skipped %s: %s", path, reason)

    def _listed(self) -> str:
        return "".join(f"\n  skipped {path}: {reason}" for path, reason in self.skipped.items())

    def _frames(self, chunk: int) -> int:
        """The number of video frames in a sample's chunk of this index."""
        return self._stride * self._geometry.chunk - (self._stride - 1 if chunk == 0 else 0)

    def _length(self, clip: Clip) -> int:
        """The number of a clip's frames, at the samples' frame rate."""
        return int(clip.until * self._fps) + 1

    def _starts(self, clips: Sequence[Clip]) -> int:
        """From how many of the first clip's frames a sample can be filled; below 1 if from none.

        These are its first frames: the later a sample begins, the less the clips hold for it.
        """
        after = sum(self._length(clip) // self._frames(1) for clip in clips[1:])
        own = max(self._geometry.chunks - after, 1)
        return self._length(clips[0]) - (self._frames(0) + (own - 1) * self._frames(1)) + 1

    def _spans(self, clips: Sequence[Clip], start: int) -> Iterator[Span]:
        """The parts of a sample that begins at this frame of the first clip."""
        chunk = 0
        for clip in clips:
            begin, end = start, start
            first = chunk
            while chunk < self._geometry.chunks and (
                end + self._frames(chunk) <= self._length(clip)
            ):
                end += self._frames(chunk)
                chunk += 1
            if chunk > first:
                yield Span(clip, begin, end - begin, chunk - first)
            start = 0

    def _read(self, span: Span) -> Tensor:
        """A span's frames, uint8 [F, H, W, 3]."""
        times = [Fraction(span.start + index) / self._fps for index in range(span.frames)]
        try:
            return nearest_frames(
                span.clip.path, times, self._geometry.height, self._geometry.width
            )
        except Unusable as error:
            self._skip(span.clip.path, str(error))
            raise


def _prompts(spans: Sequence[Span]) -> tuple[str, ...]:
    prompts = []
    for number, span in enumerate(spans):
        mark = SCENE_CUT if number else ""
        prompts += [mark + span.clip.caption, *[span.clip.caption] * (span.chunks - 1)]
    return tuple(prompts)


def _opens(spans: Sequence[Span]) -> tuple[bool, ...]:
    return tuple(not chunk for span in spans for chunk in range(span.chunks))


def _caption(path: Path) -> str:
    if not path.exists():
        raise Unusable("has no caption")
    try:
        data = read_json(path)
    except ValueError as error:
        raise Unusable(f"its caption cannot be read ({error})") from error
    caption = data.get("caption") if isinstance(data, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable("its caption is empty")
    return caption
