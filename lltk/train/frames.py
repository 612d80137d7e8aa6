"""Frames of a video file at given times, as a player shows them, in a given size.

A player shows a frame from its own time until that of the next. A video's time begins with its
first frame.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.files.reading import check_regular

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

    _Frames = Iterator[tuple[int, VideoFrame]]

_BACK = (0, 1, 4, 16, 64)
"""Seconds before a frame to which is sought, in this order; then reading begins at the start."""
_ROUNDED = Fraction(2, 1000)
"""By how many seconds a file may round a time, at most."""
_TEXT = ("ansi", "bintext", "idf", "xbin")
"""Codecs that draw text. FFmpeg takes any ``.txt`` file for one."""


class Unusable(ValueError):
    """A clip cannot be used; the message says why."""


@dataclass(frozen=True)
class Footage:
    """When the frames of a video file are shown. Times count units of the file.

    Attributes:
        path: the file.
        unit: seconds.
        first: the time of the first frame.
        last: the time of the last one.
        end: until when that is shown.
        slack: by how much a frame's time may be off, as files round times to units.
        timed: whether the file has times; else its frames are counted, a unit each.
        aspect: width of a pixel by its height, as it is stored.
        rate: its frames a second, on average, as the file states them.
    """

    path: Path
    unit: Fraction
    first: Fraction
    last: Fraction
    end: Fraction
    slack: Fraction
    timed: bool
    aspect: Fraction
    rate: Fraction

    @property
    def seconds(self) -> Fraction:
        """How long the video is."""
        return (self.end - self.first) * self.unit

    def frames(self, fps: Fraction) -> int:
        """How many of the times 0, 1/fps, 2/fps, … are in the video."""
        return max(0, -int(-(self.end - self.slack - self.first) * self.unit * fps // 1))


def read_footage(path: Path) -> Footage:
    """When a video's frames are shown. It is read from the file's packets; nothing is decoded.

    Raises:
        Unusable: it cannot be read, or holds no video.
    """
    import av

    try:
        check_regular(path)
    except ValueError as error:
        raise Unusable(str(error).removeprefix(f"{path}: ")) from error
    try:
        with av.open(path) as file:
            stream = _video(file)
            packets = [packet for packet in file.demux(stream) if packet.size]
            unit, rate = stream.time_base, stream.average_rate
            aspect = stream.sample_aspect_ratio or Fraction(1)
            # Program streams give most frames no time of their own.
            counted = file.format.name == "mpeg"
    except av.error.FFmpegError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from error
    # A decoder begins at a keyframe, and cannot show what follows it but is shown before it.
    start = next((i for i, packet in enumerate(packets) if packet.is_keyframe), 0)
    shown = [packet for packet in packets[start:] if not packet.is_discard]
    times = [packet.pts for packet in shown if packet.pts is not None]
    if not shown:
        raise Unusable("holds no video")
    if counted or len(times) < len(shown) or not unit:
        if not rate:
            raise Unusable("has neither times of frames nor a frame rate; remux it")
        count = Fraction(len(shown))
        last, slack = count - 1, Fraction(1, 4)
        return Footage(path, 1 / rate, Fraction(0), last, count, slack, False, aspect, rate)
    earliest = packets[start].pts
    times = sorted(time for time in times if earliest is None or time >= earliest)
    final = next(packet for packet in shown if packet.pts == times[-1])
    length = Fraction(times[-1] - times[0], max(len(times) - 1, 1))
    if not length:
        length = Fraction(1 / (rate * unit)) if rate else Fraction(1)
    return Footage(
        path,
        unit,
        Fraction(times[0]),
        Fraction(times[-1]),
        Fraction(times[-1] + (final.duration or length)),
        min(Fraction(1), length / 4, _ROUNDED / unit),
        True,
        aspect,
        rate or 1 / (length * unit),
    )


def shown_frames(clip: Footage, times: Sequence[Fraction], height: int, width: int) -> Tensor:
    """The frames that are shown at some times, upright, resized and cropped as by `covering`.

    They are those that decoding the whole file gives. Reading begins at a keyframe from which that
    is sure, or at the file's start.

    Args:
        clip: the video.
        times: seconds from the video's first frame, rising.
        height, width: of the frames that are returned.

    Returns:
        uint8 [F, height, width, 3], a frame for each time.

    Raises:
        Unusable: a frame is damaged or missing, or its picture is turned by an angle that is not
            covered.
    """
    import av

    wanted = [clip.first + time / clip.unit + clip.slack for time in times]
    places = [wanted[0] - back / clip.unit for back in _BACK] if clip.timed else []
    try:
        for place in places:
            if place <= clip.first:
                break
            with av.open(clip.path) as file:
                frames = _frames_after(file, place, wanted[0])
                if frames is not None:
                    return _pictures(clip, frames, wanted, height, width)
        with av.open(clip.path) as file:
            decoded = file.decode(_video(file))
            frames = _timed(decoded) if clip.timed else enumerate(decoded)
            return _pictures(clip, frames, wanted, height, width)
    except av.error.FFmpegError as error:
        raise Unusable(f"damaged: cannot be decoded ({error.strerror})") from error


def covering(frame: Tensor, height: int, width: int, aspect: Fraction | None = None) -> Tensor:
    """A picture resized to cover a size, with its aspect kept, and cropped about its centre.

    Args:
        frame: uint8 [h, w, 3].
        height, width: the wanted size.
        aspect: width of a pixel by its height; None for 1.

    Returns:
        uint8 [height, width, 3].
    """
    old_height, old_width, _ = frame.shape
    shown_width = float(old_width * (aspect or 1))
    scale = max(height / old_height, width / shown_width)
    size = (max(height, round(old_height * scale)), max(width, round(shown_width * scale)))
    if size != (old_height, old_width):
        planes = frame.permute(2, 0, 1)[None].float()
        scaled = F.interpolate(planes, size, mode="bicubic", antialias=True)
        frame = scaled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frame[top : top + height, left : left + width].contiguous()


def _video(file: InputContainer) -> VideoStream:
    """The video of a file that may hold a cover picture too."""
    stream = file.streams.best("video")
    if stream is None:
        raise Unusable("holds no video")
    if stream.codec_context.name in _TEXT:
        raise Unusable("is text, not video")
    return cast("VideoStream", stream)


def _frames_after(file: InputContainer, place: Fraction, wanted: Fraction) -> _Frames | None:
    """The frames from a keyframe on that is shown no later than wanted; None if there is none.

    Args:
        file: just opened.
        place: the time to which is sought. Files are free to go to a later keyframe.
        wanted: the time of which a frame is needed.
    """
    stream = _video(file)
    file.seek(int(place), stream=stream)
    packets = file.demux(stream)
    key = next((packet for packet in packets if packet.is_keyframe), None)
    if key is None or key.pts is None or key.pts > wanted:
        return None
    begins = key.pts
    decoded = (frame for packet in chain([key], packets) for frame in packet.decode())
    # What is shown before the keyframe may need pictures before it.
    frames = _timed(dropwhile(lambda frame: frame.pts is None or frame.pts < begins, decoded))
    first = next(frames, None)
    if first is None or first[0] != begins or first[1].is_corrupt:
        return None
    return chain([first], frames)


def _timed(decoded: Iterator[VideoFrame]) -> _Frames:
    last = None
    for frame in decoded:
        if frame.pts is None or (last is not None and frame.pts <= last):
            raise Unusable("the times of its frames do not rise; remux it")
        last = frame.pts
        yield last, frame


def _pictures(
    clip: Footage, frames: _Frames, wanted: Sequence[Fraction], height: int, width: int
) -> Tensor:
    """The frames shown at the wanted times, uint8 [F, height, width, 3]."""
    chosen: list[Tensor] = []
    shown: VideoFrame | None = None
    time = clip.first
    for next_time, frame in frames:
        if shown is not None:
            ready = [moment for moment in wanted[len(chosen) :] if moment < next_time]
            chosen += [_picture(clip, shown, height, width)] * len(ready)
            if len(chosen) == len(wanted):
                return torch.stack(chosen)
        shown, time = frame, Fraction(next_time)
    end = clip.end + clip.slack if time >= clip.last else time
    early = [moment for moment in wanted[len(chosen) :] if moment >= end]
    if shown is None or early:
        raise Unusable(f"damaged: ends {len(early)} frames early")
    left = len(wanted) - len(chosen)
    return torch.stack(chosen + [_picture(clip, shown, height, width)] * left)


def _picture(clip: Footage, frame: VideoFrame, height: int, width: int) -> Tensor:
    """A frame as it is shown."""
    if frame.is_corrupt:
        raise Unusable(f"damaged: the frame at {frame.time:.2f} s")
    pixels = frame.to_ndarray(format="rgb24")
    turned, upright = _upright(frame, pixels)
    aspect = 1 / clip.aspect if turned else clip.aspect
    return covering(torch.from_numpy(upright.copy()), height, width, aspect)


def _upright(frame: VideoFrame, pixels: Any) -> tuple[bool, Any]:
    """Whether a picture is turned by a quarter, and the picture as its display matrix turns it.

    Raises:
        Unusable: it is turned by another angle.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, pixels
    # A picture's point (x, y) is shown at (a·x + c·y, b·x + d·y), but for where the whole lies.
    parts = struct.unpack("=9i", bytes(cast("Any", matrix)))
    a, b, _, c, d = (round(part / (1 << 16), 3) for part in parts[:5])
    if (b, c) == (0, 0) and {abs(a), abs(d)} == {1}:
        return False, pixels[:: int(d), :: int(a)]
    if (a, d) == (0, 0) and {abs(b), abs(c)} == {1}:
        return True, pixels.swapaxes(0, 1)[:: int(b), :: int(c)]
    raise Unusable(f"is shown turned by {abs(frame.rotation)}°; turn it by encoding it anew")
