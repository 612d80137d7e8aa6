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
from lltk.train.captions import SUFFIXES, read_caption
from lltk.train.data import generator_at
from lltk.train.frames import Footage, Unusable, read_footage, shown_frames
from lltk.train.progress import Note, noted, silent
from lltk.train.shortfall import chunk_frames, few_lines, shortfall

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
        """The files that were left out, wholly or in part, and why."""
        self._places: list[tuple[Sequence[Clip], int]] = []
        counts = []
        self._captions = self._written()
        files = self._files()
        looked_at = noted(files, "looking at clips", len(files), note)
        samples = {name: self._clips(files[name]) for name in looked_at}
        self._list_captions(files)
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
            raise ValueError(f"{folder}: {why}{self._listed()}")
        self._ends = list(accumulate(counts))
        if self.skipped:
            _log.warning("%s: %d files skipped", folder, len(self.skipped))

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

    def _files(self) -> dict[str, list[Path]]:
        """The files of each sample, in the order of their numbers. Others are left out."""
        found: dict[str, list[Path]] = {}
        for path in sorted((self._folder / "video").iterdir()):
            if not path.is_dir():
                found[path.name] = [path]
                continue
            numbered = []
            for inner in sorted(path.iterdir()):
                if inner.is_dir():
                    for file in sorted(file for file in inner.rglob("*") if file.is_file()):
                        self._skip(file, "is too deep; put it into video/<sample>/")
                elif inner.stem.isdecimal():
                    numbered.append(inner)
                else:
                    self._skip(inner, "its name is not a number")
            found[path.name] = sorted(numbered, key=lambda file: int(file.stem))
        return found

    def _clips(self, files: Sequence[Path]) -> list[Clip]:
        """The clips of a sample; those that are too short are among them."""
        clips: dict[str, Clip] = {}
        for path in files:
            number = path.stem.lstrip("0")
            try:
                if number in clips:
                    raise Unusable(f"has the number of {clips[number].footage.path.name}")
                clips[number] = self._clip(path)
            except Unusable as error:
                self._skip(path, str(error))
        return list(clips.values())

    def _clip(self, path: Path) -> Clip:
        footage = read_footage(path)
        clip = Clip(footage, self._caption(path), footage.frames(self._fps))
        if clip.length < (first := self._frames(0)):
            self._skip(
                path,
                f"too short: {clip.length} frames at {float(self._fps):g} fps "
                f"({float(footage.seconds):.2f} s), but a first chunk takes {first} "
                f"({float(first / self._fps):.2f} s)",
            )
        return clip

    def _caption(self, path: Path) -> str:
        place = self._caption_place(path)
        found = self._captions.get(place, [])
        if not found or found[0].suffix.lower() not in SUFFIXES:
            only = ", ".join(file.name for file in found)
            raise Unusable(f"has no caption{only and f', only {only}'}: write {place}.json")
        return read_caption(found[0])

    def _written(self) -> dict[Path, list[Path]]:
        """The files of captions by their paths without suffix, those first that are read first."""
        found: dict[Path, list[Path]] = {}
        order = {suffix: number for number, suffix in enumerate(SUFFIXES)}
        files = [path for path in (self._folder / "caption").rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (order.get(file.suffix.lower(), 9), file)):
            found.setdefault(file.with_suffix(""), []).append(file)
        return found

    def _caption_place(self, path: Path) -> Path:
        """The path of a clip's caption, without its suffix."""
        inner = path.relative_to(self._folder / "video")
        return self._folder / "caption" / inner.with_suffix("")

    def _list_captions(self, files: Mapping[str, Sequence[Path]]) -> None:
        """List what is among the captions, but is none of a clip."""
        places = {self._caption_place(path) for paths in files.values() for path in paths}
        for place, (first, *others) in sorted(self._captions.items()):
            if place not in places:
                self._skip(first, "has no clip")
            for file in others:
                self._skip(file, f"is beside {first.name}, which goes before it")

    def _skip(self, path: Path, reason: str) -> None:
        if path not in self.skipped:
            self.skipped[path] = reason
            _log.warning("skipped %s: %s", path, reason)

    def _listed(self) -> str:
        return few_lines([f"\n  skipped {path}: {reason}" for path, reason in self.skipped.items()])

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
            self._skip(span.clip.footage.path, str(error))
            raise


def _prompts(spans: Sequence[Span]) -> tuple[str, ...]:
    prompts = []
    for number, span in enumerate(spans):
        mark = SCENE_CUT if number else ""
        prompts += [mark + span.clip.caption, *[span.clip.caption] * (span.chunks - 1)]
    return tuple(prompts)


def _opens(spans: Sequence[Span]) -> tuple[bool, ...]:
    return tuple(not chunk for span in spans for chunk in range(span.chunks))
