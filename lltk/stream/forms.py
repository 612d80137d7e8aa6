"""The forms that a video can be written in, by the suffix of its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import SEEK_END, RawIOBase
from pathlib import Path


def _comment_gif(file: RawIOBase, comment: bytes) -> None:
    """Put a comment before the byte that ends a GIF."""
    file.seek(-1, SEEK_END)
    file.write(b"\x21\xfe" + bytes([len(comment)]) + comment + b"\0\x3b")


def _comment_webp(file: RawIOBase, comment: bytes) -> None:
    """Append a chunk that readers of WebP skip, as they do not know it."""
    file.seek(0, SEEK_END)
    file.write(b"NOTE" + len(comment).to_bytes(4, "little") + comment + b"\0" * (len(comment) % 2))
    size = file.tell()
    file.seek(4)
    file.write((size - 8).to_bytes(4, "little"))


@dataclass(frozen=True)
class Form:
    """How FFmpeg writes a form of video.

    Attributes:
        container, encoder: its names for them.
        pixels: its name for the encoder's pixels. Those in YUV are in BT.709, 4:2:0.
        options: of the encoder; ``%d`` stands for its number of threads.
        container_options: of the container.
        fastest: the most frames a second that it can show.
        any_cut: whether it can be cut off before any frame, not just before keyframes.
        comment: writes a comment into a whole file; None where the container's metadata hold it.
    """

    container: str
    encoder: str
    pixels: str = "yuv420p"
    options: Mapping[str, str] = field(default_factory=dict)
    container_options: Mapping[str, str] = field(default_factory=dict)
    fastest: int = 1000
    any_cut: bool = False
    comment: Callable[[RawIOBase, bytes], None] | None = None


_H264 = {"crf": "18", "preset": "veryfast", "tune": "zerolatency", "sc_threshold": "0"}
_VP9 = {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6", "lag-in-frames": "0"}
_AV1 = {"crf": "18", "preset": "10", "svtav1-params": "rtc=1:lp=%d"}
"""This encoder takes its number of threads from nowhere else."""
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_CLUSTERS = {"cluster_size_limit": "1"}
"""A cluster a frame, so that a file that was cut off holds every frame before the last."""

FORMS: Mapping[str, Form] = {
    ".mp4": Form("mp4", "libx264", options=_H264, container_options=_FRAGMENTS),
    ".mkv": Form("matroska", "libx264", options=_H264, container_options=_CLUSTERS),
    ".webm": Form("webm", "libvpx-vp9", options=_VP9, container_options=_CLUSTERS),
    ".gif": Form(
        "gif",
        "gif",
        "pal8",
        container_options={"loop": "0"},
        fastest=50,
        any_cut=True,
        comment=_comment_gif,
    ),
    ".webp": Form(
        "webp",
        "libwebp_anim",
        options={"quality": "90"},
        container_options={"loop": "0"},
        comment=_comment_webp,
    ),
}
"""By suffix, in lower case."""

MP4S: Mapping[str, Form] = {
    "h264": FORMS[".mp4"],
    "vp9": Form("mp4", "libvpx-vp9", options=_VP9, container_options=_FRAGMENTS),
    "av1": Form("mp4", "libsvtav1", options=_AV1, container_options=_FRAGMENTS),
}
"""How an MP4 is written with a codec."""


def form_of(path: Path) -> Form | None:
    """The form that a path's suffix names; None for a folder of frames, which has no suffix.

    Raises:
        ValueError: no video can be written in the form that the suffix names.
    """
    suffix = path.suffix.lower()
    if suffix and suffix not in FORMS:
        raise ValueError(
            f"{path}: a video cannot be written as {suffix}; use {', '.join(FORMS)}, or a name "
            "without a suffix for a folder of PNG frames"
        )
    return FORMS[suffix] if suffix else None
