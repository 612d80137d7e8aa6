"""Clips on disk: captioned shots, cut into samples of whole chunks.

::

    video/<sample>/<number>.mp4       the shots of one sample, in the order of their numbers
    caption/<sample>/<number>.json    {"caption": "…"}
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.graph.geometry import Geometry
from lltk.stream.script import SCENE_CUT
from lltk.train.data import generator_at

if TYPE_CHECKING:
    from av import VideoFrame

_TRIES = 100
"""Places drawn for a sample before the folder is given up as damaged."""
_log = logging.getLogger(__name__)


class Unusable(ValueError):
    """A clip cannot be used; the message says why."""


@dataclass(frozen=True)
class Clip:
    """A shot that can be read.

    Attributes:
        path: the video.
        caption: what it shows.
        until: the last time, in seconds from its first frame, that has a nearest frame.
    """

    path: Path
    caption: str
    until: Fraction


@dataclass(frozen=True)
class Span:
    """Consecutive chunks of one clip.

    Attributes:
        clip: where from.
        start, frames: which of its frames, counted at the samples' rate.
        chunks: how many chunks they are.
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
        prompts: one a chunk; the first chunk of every shot but the first is marked as a scene cut.
        opens: whether a shot begins, one a chunk.
    """

    video: Tensor
    prompts: tuple[str, ...]
    opens: tuple[bool, ...]


class FolderClips:
    """Samples from a folder: a place in a clip, and the clips after it as further shots.

    The first chunk takes stride·C − stride + 1 video frames, each further one stride·C, and none
    lies in two clips: what a clip has left is dropped. Places are uniform over all clips and frames
    from which a sample can be filled. Frames are the nearest in time, resized to cover the
    geometry's height and width and cropped about their centre.

    A clip that is damaged, too short or without a caption is skipped. One that turns out damaged
    only where it is read costs its sample another place; which, depends on the files alone.

    Args:
        folder: holds ``video`` and ``caption``.
        geometry: chunk, latent frames, height and width of a sample.
        fps: video frames a second of a sample.
        shots: most clips a sample is made of.
        stride: video frames a latent frame.

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
        """Clips that were not used, at least not whole, and why."""
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
        """The sample of a number: a function of the arguments and the files.

        Raises:
            ValueError: hardly a clip can be read.
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
        raise ValueError(f"{self._folder}: hardly a clip can be read{self._listed()}")

    def _samples(self) -> Iterator[list[Clip]]:
        """The usable clips of each sample's folder, in order."""
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
        clip = Clip(path, caption, _until(path))
        if (length := self._length(clip)) < self._frames(0):
            raise Unusable(
                f"too short: {length} frames at {float(self._fps):g} fps, a first chunk takes "
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
        """Video frames of a chunk."""
        return self._stride * self._geometry.chunk - (self._stride - 1 if chunk == 0 else 0)

    def _length(self, clip: Clip) -> int:
        """Frames of a clip at the samples' rate."""
        return int(clip.until * self._fps) + 1

    def _starts(self, clips: Sequence[Clip]) -> int:
        """Frames of the first clip from which a sample can be filled: the first so many."""
        after = sum(self._length(clip) // self._frames(1) for clip in clips[1:])
        own = max(self._geometry.chunks - after, 1)
        return self._length(clips[0]) - (self._frames(0) + (own - 1) * self._frames(1)) + 1

    def _spans(self, clips: Sequence[Clip], start: int) -> Iterator[Span]:
        """A sample's parts, from a frame of the first clip on."""
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
            return _nearest(span.clip.path, times, self._geometry.height, self._geometry.width)
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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Unusable("has no caption") from error
    except ValueError as error:
        raise Unusable(f"its caption is not JSON ({error})") from error
    caption = data.get("caption") if isinstance(data, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable("its caption is empty")
    return caption


def _until(path: Path) -> Fraction:
    """Half a frame past a video's last, by its packets; nothing is decoded."""
    import av

    try:
        with av.open(path) as file:
            for stream in file.streams.video[:1]:
                times = [packet.pts for packet in file.demux(stream) if packet.pts is not None]
                unit, rate = stream.time_base, stream.average_rate
                if times and unit and rate:
                    return (max(times) - min(times)) * unit + 1 / (2 * rate)
    except av.error.FFmpegError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from error
    raise Unusable("holds no video")


def _nearest(path: Path, times: Sequence[Fraction], height: int, width: int) -> Tensor:
    """The frames of a video nearest to rising times, in seconds from its first frame; resized."""
    chosen: list[Tensor] = []
    for frame, until in _shown(path, times[0]):
        while len(chosen) < len(times) and times[len(chosen)] <= until:
            if frame.is_corrupt:
                raise Unusable(f"damaged: {frame.time:.2f} s from its beginning")
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            chosen.append(covering(pixels, height, width))
        if len(chosen) == len(times):
            return torch.stack(chosen)
    raise Unusable(f"damaged: ends {len(times) - len(chosen)} frames early")


def _shown(path: Path, start: Fraction) -> Iterator[tuple[VideoFrame, Fraction]]:
    """A video's frames from a time or some way before it on, each with the time until which it is
    the nearest; times are in seconds from the first frame."""
    import av

    try:
        with av.open(path) as file:
            stream = file.streams.video[0]
            origin, unit, rate = stream.start_time or 0, stream.time_base, stream.average_rate
            assert unit is not None and rate is not None, "it has a length"
            file.seek(origin + int(start / unit), stream=stream)
            last: VideoFrame | None = None
            shown = Fraction(0)
            for frame in file.decode(stream):
                before, shown = shown, ((frame.pts or 0) - origin) * unit
                if last is not None:
                    yield last, (before + shown) / 2
                last = frame
            if last is not None:
                yield last, shown + 1 / rate
    except av.error.FFmpegError as error:
        raise Unusable(f"damaged: cannot be decoded ({error.strerror})") from error


def covering(frame: Tensor, height: int, width: int) -> Tensor:
    """A picture resized to cover a size, its aspect kept, and cropped about its centre.

    Args:
        frame: uint8 [h, w, 3].
        height, width: wanted.

    Returns:
        uint8 [height, width, 3].
    """
    old_height, old_width, _ = frame.shape
    scale = max(height / old_height, width / old_width)
    size = (max(height, round(old_height * scale)), max(width, round(old_width * scale)))
    if size != (old_height, old_width):
        planes = frame.permute(2, 0, 1)[None].float()
        scaled = F.interpolate(planes, size, mode="bicubic", antialias=True)
        frame = scaled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frame[top : top + height, left : left + width].contiguous()
