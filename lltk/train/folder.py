"""A folder of captioned clips, each one shot, cut into samples of whole chunks.

::

    video/<sample>/<number>.mp4       the shots of one sample, in the order of their numbers
    video/<sample>.mp4                a sample of one shot
    caption/<sample>/<number>.json    {"caption": "…"}, or a text: see `read_caption`
    caption/<sample>.txt

Clips may be of any format that the video library decodes.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from lltk.graph.geometry import Geometry
from lltk.stream.script import SCENE_CUT
from lltk.train.clip_files import ClipFiles, Take
from lltk.train.data import generator_at
from lltk.train.frames import Footage, Unusable, shown_frames
from lltk.train.progress import Note, silent
from lltk.train.shortfall import chunk_frames, shortfall

_TRIES = 100
"""How many places are tried for a sample before the folder is taken to be damaged."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A video of one shot that can be read.

    Attributes:
        footage: the video.
        caption: what it shows.
        length: the number of its frames, at the samples' frame rate.
    """

    footage: Footage
    caption: str
    length: int


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
        valid: how many of its latent frames are no padding; None where there may be none.
    """

    video: Tensor
    prompts: tuple[str, ...]
    opens: tuple[bool, ...]
    valid: int | None = None


class FolderClips:
    """Samples from a folder of clips.

    A sample begins at some frame of a clip and goes on with the clips after it, each of which is a
    new shot. It begins at any place from which it can be filled, all equally likely. A chunk lies
    in one clip: frames at a clip's end that do not fill a chunk are dropped. With chunks of C
    latent frames, a sample's first chunk takes stride·C − stride + 1 video frames and each further
    one stride·C.

    The frames are those that a player shows at their times, upright. They are resized to cover the
    geometry's height and width with their aspect kept, and cropped about their centre.

    A clip that is damaged, too short or without a caption is skipped, and so is any other file.
    Some damage shows only when a frame is read. Then another place is drawn for the sample; which
    one follows from the sample's number and the files alone.

    Args:
        folder: holds ``video`` and ``caption``.
        geometry: has chunk, latent frames, height and width of a sample.
        fps: video frames a second at which the clips are read.
        shots: most clips in a sample.
        stride: video frames in a latent frame.
        note: told how many samples' files have been looked at.

    Raises:
        ValueError: there is no such folder, or no sample can be filled; says what was skipped.
    """

    def __init__(
        self,
        folder: Path,
        geometry: Geometry,
        fps: float,
        shots: int,
        stride: int = 4,
        note: Note = silent,
    ) -> None:
        self._files = ClipFiles(folder)
        self._folder = folder
        self._geometry = geometry
        self._fps = Fraction(fps).limit_denominator(1001)
        self._stride = stride
        self._places: list[tuple[Sequence[Clip], int]] = []
        counts = []
        takes = self._files.read(self._numbered(), note)
        samples = {name: [self._clip(take) for take in takes[name]] for name in takes}
        for found in samples.values():
            clips = [clip for clip in found if clip.length >= self._frames(0)]
            for first in range(len(clips)):
                tail = clips[first : first + shots]
                if (starts := self._starts(tail)) > 0:
                    self._places.append((tail, starts))
                    counts.append(starts)
        if not self._places:
            lengths = {name: [clip.length for clip in samples[name]] for name in samples}
            why = shortfall(lengths, geometry, self._fps, shots, stride)
            raise ValueError(f"{folder}: {why}{self._files.listed()}")
        self._ends = list(accumulate(counts))
        self._files.count_skipped()

    @property
    def skipped(self) -> Mapping[Path, str]:
        """The files that were left out, wholly or in part, and why."""
        return self._files.skipped

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
            f"{self._files.listed()}"
        )

    def _numbered(self) -> dict[str, list[Path]]:
        """The files of each sample; in a sample's folder, those whose names are numbers."""
        files = self._files.files()
        for paths in files.values():
            for path in list(paths):
                if path.parent != self._folder / "video" and not path.stem.isdecimal():
                    self._files.skip(path, "its name is not a number")
                    paths.remove(path)
        return files

    def _clip(self, take: Take) -> Clip:
        footage = take.footage
        clip = Clip(footage, take.caption, footage.frames(self._fps))
        if clip.length < (first := self._frames(0)):
            self._files.skip(
                footage.path,
                f"too short: {clip.length} frames at {float(self._fps):g} fps "
                f"({float(footage.seconds):.2f} s), but a first chunk takes {first} "
                f"({float(first / self._fps):.2f} s)",
            )
        return clip

    def _frames(self, chunk: int) -> int:
        """The number of video frames in a sample's chunk of this index."""
        first, later = chunk_frames(self._geometry, self._stride)
        return later if chunk else first

    def _starts(self, clips: Sequence[Clip]) -> int:
        """From how many of the first clip's frames a sample can be filled; below 1 if from none.

        These are its first frames: the later a sample begins, the less the clips hold for it.
        """
        after = sum(clip.length // self._frames(1) for clip in clips[1:])
        own = max(self._geometry.chunks - after, 1)
        return clips[0].length - (self._frames(0) + (own - 1) * self._frames(1)) + 1

    def _spans(self, clips: Sequence[Clip], start: int) -> Iterator[Span]:
        """The parts of a sample that begins at this frame of the first clip."""
        chunk = 0
        for clip in clips:
            begin, end = start, start
            first = chunk
            while chunk < self._geometry.chunks and (end + self._frames(chunk) <= clip.length):
                end += self._frames(chunk)
                chunk += 1
            if chunk > first:
                yield Span(clip, begin, end - begin, chunk - first)
            start = 0

    def _read(self, span: Span) -> Tensor:
        """A span's frames, uint8 [F, H, W, 3]."""
        times = [Fraction(span.start + index) / self._fps for index in range(span.frames)]
        try:
            return shown_frames(
                span.clip.footage, times, self._geometry.height, self._geometry.width
            )
        except Unusable as error:
            self._files.skip(span.clip.footage.path, str(error))
            raise


def _prompts(spans: Sequence[Span]) -> tuple[str, ...]:
    prompts = []
    for number, span in enumerate(spans):
        mark = SCENE_CUT if number else ""
        prompts += [mark + span.clip.caption, *[span.clip.caption] * (span.chunks - 1)]
    return tuple(prompts)


def _opens(spans: Sequence[Span]) -> tuple[bool, ...]:
    return tuple(not chunk for span in spans for chunk in range(span.chunks))
