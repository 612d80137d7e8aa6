"""Frames of a video file at given times, in a given size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.files.reading import check_regular

if TYPE_CHECKING:
    from av import VideoFrame


class Unusable(ValueError):
    """A clip cannot be used; the message says why."""


def last_time(path: Path) -> Fraction:
    """The time until which a video's last frame is the nearest: half a frame after it.

    It is read from the file's packets; nothing is decoded.

    Args:
        path: a video file.

    Returns:
        Seconds from the video's first frame.

    Raises:
        Unusable: it cannot be read, or holds no video.
    """
    import av

    try:
        check_regular(path)
    except ValueError as error:
        raise Unusable(str(error)) from error
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


def nearest_frames(path: Path, times: Sequence[Fraction], height: int, width: int) -> Tensor:
    """The frames of a video that are nearest to some times, resized and cropped as by `covering`.

    Args:
        path: a video file.
        times: seconds from the video's first frame, rising.
        height, width: of the frames that are returned.

    Returns:
        uint8 [F, height, width, 3], a frame for each time.

    Raises:
        Unusable: a frame is damaged or missing.
    """
    chosen: list[Tensor] = []
    for frame, until in _shown(path, times[0]):
        while len(chosen) < len(times) and times[len(chosen)] <= until:
            if frame.is_corrupt:
                raise Unusable(f"damaged: the frame at {frame.time:.2f} s")
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            chosen.append(covering(pixels, height, width))
        if len(chosen) == len(times):
            return torch.stack(chosen)
    raise Unusable(f"damaged: ends {len(times) - len(chosen)} frames early")


def _shown(path: Path, start: Fraction) -> Iterator[tuple[VideoFrame, Fraction]]:
    """A video's frames, each with the time until which it is the nearest.

    Reading begins at the last keyframe before ``start``. Times are seconds from the first frame.
    """
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
    """A picture resized to cover a size, with its aspect kept, and cropped about its centre.

    Args:
        frame: uint8 [h, w, 3].
        height, width: the wanted size.

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
