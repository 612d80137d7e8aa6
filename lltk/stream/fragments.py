"""Live video: fragmented MP4, given to a sink as frames are made.

A browser's media source takes an init segment and then fragments. Each fragment here is a frame,
and a write may begin with a frame that a decoder can start at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from types import TracebackType
from typing import TYPE_CHECKING, cast

from torch import Tensor

from lltk.stream.video import check_frames, check_sides, in_yuv, tag_colours, threaded

if TYPE_CHECKING:
    from av import VideoStream


@dataclass(frozen=True)
class Codec:
    """How FFmpeg encodes live video.

    Attributes:
        encoder: its name for the encoder.
        options: of the encoder, with which it gives a packet for each frame at once, and begins a
            group of pictures only where it is told to.
        box: the type of the MP4 box that describes the stream.
        name: the codec's name for a browser (RFC 6381), from that box's content.
    """

    encoder: str
    options: Mapping[str, str]
    box: bytes
    name: Callable[[bytes], str]


def _avc(box: bytes) -> str:
    """Profile, constraints and level, in hexadecimal."""
    return f"avc1.{box[1:4].hex()}"


def _vp9(box: bytes) -> str:
    """Profile, level and bits of a sample."""
    return f"vp09.{box[4]:02d}.{box[5]:02d}.{box[6] >> 4:02d}"


def _av1(box: bytes) -> str:
    """Profile, level and tier, and the eight bits of a sample."""
    return f"av01.{box[1] >> 5}.{box[1] & 31:02d}{'MH'[box[2] >> 7]}.08"


_H264 = {
    "crf": "20",
    "preset": "veryfast",
    "tune": "zerolatency",
    "sc_threshold": "0",
}
_VP9 = {"crf": "28", "b": "0", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
_AV1 = {"crf": "20", "preset": "10", "svtav1-params": "rtc=1:lp=%d"}
"""``%d`` stands for the number of threads, which this encoder takes from nowhere else."""

CODECS: Mapping[str, Codec] = {
    "h264": Codec("libx264", _H264, b"avcC", _avc),
    "vp9": Codec("libvpx-vp9", _VP9, b"vpcC", _vp9),
    "av1": Codec("libsvtav1", _AV1, b"av1C", _av1),
}
"""By the names that a user gives them."""

_FOREVER = 1 << 30
"""Frames of a group of pictures: its end is the next write."""
_HEADER = {"movflags": "empty_moov+default_base_moof+frag_custom"}
_FRAGMENTS = {
    "movflags": "empty_moov+default_base_moof+frag_every_frame+frag_discont+skip_trailer",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",
}
"""A muxer of one write: it goes on from the time of its first frame."""


class FragmentWriter:
    """Fragmented MP4 for a sink: an init segment, then a fragment a frame.

    The sink gets the init segment while the writer is made, and each fragment whole, in a call of
    its own. When `write` returns, all its frames have been given away: no encoder and no muxer
    holds one back. Colours are as `VideoWriter` has them.

    Args:
        sink: takes the bytes, in the thread that writes. What it raises, `write` raises.
        height, width: pixels, even.
        fps: frames a second.
        codec: ``h264``, ``vp9`` or ``av1``.
        threads: of the encoder.

    Raises:
        ValueError: odd sides, no frame rate, an unknown codec, one without an encoder here, or
            sides or a frame rate that the encoder does not take.
    """

    def __init__(
        self,
        sink: Callable[[bytes], None],
        height: int,
        width: int,
        fps: float,
        codec: str = "h264",
        threads: int = 1,
    ) -> None:
        if codec not in CODECS:
            raise ValueError(f"codec: {codec!r} is unknown; choose one of {', '.join(CODECS)}")
        check_sides(height, width)
        if not 1 <= fps <= 1000:
            raise ValueError(f"video: {fps:g} frames a second: write from 1 to 1000")
        import av

        made = CODECS[codec]
        try:
            av.codec.Codec(made.encoder, "w")
        except av.codec.codec.UnknownCodecError as error:
            raise ValueError(
                f"codec: {codec} needs FFmpeg's encoder {made.encoder}, which the installed av "
                f"lacks; install av from its wheel, or choose another of {', '.join(CODECS)}"
            ) from error
        self._sink = sink
        self._shape = (height, width, 3)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._frames = 0
        header = BytesIO()
        # It is never muxed into: it writes the init segment and owns the encoder.
        self._file = av.open(header, "w", format="mp4", options=_HEADER)
        options = threaded(made.options, threads)
        stream = self._file.add_stream(made.encoder, self._rate, options=options)
        self._stream = cast("VideoStream", stream)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        self._stream.gop_size = _FOREVER
        self._stream.thread_count = threads
        tag_colours(self._stream)
        try:
            self._file.start_encoding()
        except av.error.FFmpegError as error:
            raise ValueError(
                f"codec: {codec} is not encoded in {width}x{height} at {fps:g} frames a second "
                f"({error.strerror}); choose another of {', '.join(CODECS)}, or another size or "
                "rate"
            ) from error
        self.init_segment = header.getvalue()
        """What a decoder needs before any fragment."""
        self.codec_string = made.name(_content(self.init_segment, made.box))
        """The codec as a browser is told it: a parameter of the media type ``video/mp4``."""
        self._closed = False
        sink(self.init_segment)

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return self._frames

    def write(self, frames: Tensor, keyframe: bool = True) -> None:
        """Encode frames and give all of them to the sink.

        Args:
            frames: uint8 [F, H, W, 3], RGB, on the CPU.
            keyframe: whether the first of them needs nothing before it but the init segment. The
                first of all always is such a frame.

        Raises:
            ValueError: another shape or dtype, or no frame.
        """
        assert not self._closed, "the writer is closed"
        check_frames(frames, self._shape, "video", least=1)
        import av

        made = BytesIO()
        options = _FRAGMENTS | {"fragment_index": str(self._frames + 1)}
        with av.open(made, "w", format="mp4", options=options) as file:
            target = file.add_stream_from_template(self._stream)
            file.start_encoding()
            _taken(made)  # the header once more
            for k, pixels in enumerate(frames.numpy()):
                picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame = in_yuv(self._reformatter, picture)
                frame.pts, frame.time_base = self._frames, 1 / self._rate
                if keyframe and k == 0:
                    frame.pict_type = av.video.frame.PictureType.I
                for packet in self._stream.encode(frame):
                    packet.stream = target
                    file.mux(packet)
                self._frames += 1
                if fragment := _taken(made):
                    self._sink(fragment)
        self._sink(_taken(made))  # the muxer ends a fragment as the next frame comes

    def close(self) -> None:
        """End the encoder. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        assert not self._stream.encode(None), "the encoder held frames back"
        self._file.close()

    def __enter__(self) -> FragmentWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _taken(buffer: BytesIO) -> bytes:
    """What a buffer holds, which it then holds no more."""
    data = buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
    return data


def _content(segment: bytes, box: bytes) -> bytes:
    """The content of the only box of a type."""
    start = segment.index(box)
    return segment[start + 4 : start - 4 + int.from_bytes(segment[start - 4 : start], "big")]
