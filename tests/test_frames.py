"""Frames at given times are those of a full decode, in every container, upright and in shape."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from lltk.train.frames import read_footage, shown_frames

pytestmark = pytest.mark.cpu

FRAMES, HEIGHT, WIDTH = 40, 64, 96
"""x265 writes beyond its memory where pictures are smaller."""


def numbered(i: int) -> np.ndarray[Any, Any]:
    """A picture that says a number below 64 in six black or white tiles."""
    bits = np.array([255 * (i >> bit & 1) for bit in range(6)], np.uint8).reshape(2, 3)
    return np.repeat(bits.repeat(32, 0).repeat(32, 1)[..., None], 3, 2)


def number(picture: Any) -> int:
    """What a picture says."""
    centres = np.asarray(picture)[16::32, 16::32, 0].astype(int).flatten()
    return int(sum((level > 128) << bit for bit, level in enumerate(centres)))


@dataclass(frozen=True)
class Video:
    """How a video is written: as so many frames at 24 a second, or at ``times`` in ms."""

    suffix: str
    codec: str
    options: dict[str, str] = field(default_factory=dict)
    mux: dict[str, str] = field(default_factory=dict)
    times: list[int] | None = None
    change: Callable[[bytearray], None] | None = None
    draw: Callable[[int], np.ndarray[Any, Any]] = numbered
    aspect: Fraction | None = None

    def write(self, folder: Path) -> Path:
        path = folder / f"video{self.suffix}"
        with av.open(path, "w", options=self.mux) as file:
            stream: Any = file.add_stream(self.codec, rate=24, options=self.options)
            stream.height, stream.width, _ = self.draw(0).shape
            stream.pix_fmt = "yuv420p"
            if self.aspect is not None:
                stream.codec_context.sample_aspect_ratio = self.aspect
            if self.times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            for i in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(self.draw(i), format="rgb24")
                if self.times is not None:
                    frame.pts, frame.time_base = self.times[i], Fraction(1, 1000)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        if self.change is not None:
            data = bytearray(path.read_bytes())
            self.change(data)
            path.write_bytes(data)
        return path


def trim(data: bytearray) -> None:
    """Let a file's edit list show frames 14 to 29 alone."""
    at, media, movie = (data.index(name) + 4 for name in (b"elst", b"mdhd", b"mvhd"))
    (scale,) = struct.unpack(">I", data[media + 12 : media + 16])
    (movie_scale,) = struct.unpack(">I", data[movie + 12 : movie + 16])
    _, start, rate = struct.unpack(">iii", data[at + 8 : at + 20])
    one = scale // 24
    length = 16 * one * movie_scale // scale
    data[at + 8 : at + 20] = struct.pack(">iii", length, start + 14 * one, rate)


def turn(*matrix: int) -> Callable[[bytearray], None]:
    """Let a track's header show it turned by a matrix."""

    def change(data: bytearray) -> None:
        at = data.index(b"tkhd") + 4
        begin = at + (24 if data[at] == 0 else 36) + 16
        a, b, c, d = (part << 16 for part in matrix)
        data[begin : begin + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)

    return change


UNEVEN = [int(time) for time in np.cumsum([0, *([20, 70, 41, 250, 33, 33, 90] * 6)])][:FRAMES]
B = {"bf": "3", "g": "12", "crf": "10", "sc_threshold": "0"}
OPEN = {"crf": "10", "x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0"}
REFRESH = {"crf": "10", "x264-params": "intra-refresh=1:keyint=12:bframes=0"}
HEVC = {"x265-params": "keyint=12:open-gop=1:bframes=3:scenecut=0:log-level=none", "crf": "10"}
AV1 = {"g": "12", "preset": "10", "crf": "10"}
VP9 = {"g": "12", "deadline": "realtime", "cpu-used": "8"}
M2 = {"bf": "2", "g": "12", "qmin": "2", "qmax": "4"}
VIDEOS = {
    "mp4": Video(".mp4", "libx264", B),
    "mp4, fragmented": Video(".mp4", "libx264", B, {"movflags": "frag_keyframe+empty_moov"}),
    "mp4, no edit list": Video(".mp4", "libx264", B, {"use_editlist": "0"}),
    "mp4, trimmed": Video(".mp4", "libx264", B, change=trim),
    "mp4, trimmed, no B": Video(".mp4", "libx264", B | {"bf": "0"}, change=trim),
    "mp4, open": Video(".mp4", "libx264", OPEN),
    "mp4, refreshed": Video(".mp4", "libx264", REFRESH),
    "mp4, uneven": Video(".mp4", "libx264", B, times=UNEVEN),
    "mkv, uneven": Video(".mkv", "libx264", OPEN, times=UNEVEN),
    "mov": Video(".mov", "mpeg4", M2),
    "mkv": Video(".mkv", "libx264", OPEN),
    "ts": Video(".ts", "libx264", B),
    "ts, open": Video(".ts", "libx264", OPEN),
    "ts, MPEG-2": Video(".ts", "mpeg2video", M2),
    "mp4, HEVC": Video(".mp4", "libx265", HEVC),
    "ts, HEVC": Video(".ts", "libx265", HEVC),
    "webm, VP8": Video(".webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    "webm, VP9": Video(".webm", "libvpx-vp9", VP9),
    "mp4, VP9": Video(".mp4", "libvpx-vp9", VP9),
    "webm, AV1": Video(".webm", "libsvtav1", AV1),
    "mp4, AV1": Video(".mp4", "libsvtav1", AV1),
    "avi": Video(".avi", "mpeg4", M2),
    "flv": Video(".flv", "libx264", B),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A video's file, and by a full decode the times and numbers of its frames."""

    @cache
    def make(name: str) -> tuple[Path, list[tuple[Fraction, int]]]:
        path = VIDEOS[name].write(tmp_path_factory.mktemp("video"))
        with av.open(path) as file:
            found = [
                (frame.pts * frame.time_base, number(frame.to_ndarray(format="rgb24")))
                for frame in file.decode(video=0)
                if frame.pts is not None and frame.time_base is not None
            ]
        first = found[0][0]
        return path, [(time - first, said) for time, said in found]

    return make


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_a_full_decode(
    name: str, written: Callable[[str], tuple[Path, Any]]
) -> None:
    path, decoded = written(name)
    clip = read_footage(path)
    said = [frame for _, frame in decoded]
    trimmed = "trimmed" in name
    assert said == (list(range(14, 30)) if trimmed else list(range(FRAMES)))
    if VIDEOS[name].times is None:
        assert clip.frames(Fraction(24)) == len(said)
        for start in range(len(said) - 4):
            times = [Fraction(i, 24) for i in range(start, start + 5)]
            shown = shown_frames(clip, times, HEIGHT, WIDTH)
            assert [number(frame) for frame in shown] == said[start : start + 5]

    @settings(max_examples=12)
    @given(st.lists(st.integers(0, 9999), min_size=1, max_size=4).map(sorted))
    def check(places: list[int]) -> None:
        times = [Fraction(place, 10000) * clip.seconds for place in places]
        for time, frame in zip(times, shown_frames(clip, times, HEIGHT, WIDTH), strict=True):
            # Files round times: near a frame's end either frame will do.
            either = {
                [said for begins, said in decoded if begins <= time + off][-1]
                for off in (Fraction(0), Fraction(2, 1000))
            }
            assert number(frame) in either

    check()


@pytest.mark.parametrize("name", ["mp4", "webm, AV1", "mp4, HEVC"])
def test_what_lies_far_before_is_not_decoded(
    name: str, written: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = written(name)
    clip = read_footage(path)
    monkeypatch.setattr("lltk.train.frames._BACK", ())
    late = [Fraction(38, 24)]
    slow = shown_frames(clip, late, HEIGHT, WIDTH)
    monkeypatch.undo()
    decode, count = av.Packet.decode, []
    monkeypatch.setattr(
        "lltk.train.frames.chain", lambda *parts: (count.append(p) or p for x in parts for p in x)
    )
    assert torch.equal(shown_frames(clip, late, HEIGHT, WIDTH), slow)
    assert decode and 0 < len(count) < FRAMES


def test_a_time_beyond_the_end_is_damage(written: Callable[[str], tuple[Path, Any]]) -> None:
    clip = read_footage(written("mp4")[0])
    times = [clip.seconds - Fraction(1, 100), clip.seconds + 1]
    assert "ends 1 frames early" in refused(shown_frames, clip, times, HEIGHT, WIDTH)


def marked(_: int) -> np.ndarray[Any, Any]:
    """Dark, with a white upper left corner: a quarter of each side."""
    picture = np.full((64, 96, 3), 30, np.uint8)
    picture[:16, :24] = 240
    return picture


@pytest.mark.parametrize(
    ("matrix", "size", "corner"),
    [
        ((1, 0, 0, 1), (64, 96), (0, 0)),
        ((0, 1, -1, 0), (96, 64), (0, 1)),
        ((-1, 0, 0, -1), (64, 96), (1, 1)),
        ((0, -1, 1, 0), (96, 64), (1, 0)),
        ((-1, 0, 0, 1), (64, 96), (0, 1)),
        ((0, 1, 1, 0), (96, 64), (0, 0)),
    ],
)
def test_turned_videos_are_upright(
    matrix: tuple[int, ...], size: tuple[int, int], corner: tuple[int, int], tmp_path: Path
) -> None:
    """A display matrix turns by quarters, or mirrors."""
    path = Video(".mp4", "libx264", B, change=turn(*matrix), draw=marked).write(tmp_path)
    (shown,) = shown_frames(read_footage(path), [Fraction(1)], *size)
    height, width = size
    lit = shown[..., 0] > 128
    corners = [(y, x) for y in (0, 1) for x in (0, 1) if lit[(6, height - 7)[y], (6, width - 7)[x]]]
    assert corners == [corner]


def test_a_slanted_video_is_refused(tmp_path: Path) -> None:
    def slant(data: bytearray) -> None:
        turn(1, 0, 0, 1)(data)
        at = data.index(b"tkhd") + 4 + 24 + 16
        a, b = int(0.8 * (1 << 16)), int(0.6 * (1 << 16))
        data[at : at + 36] = struct.pack(">9i", a, b, 0, -b, a, 0, 0, 0, 1 << 30)

    path = Video(".mp4", "libx264", B, change=slant, draw=marked).write(tmp_path)
    assert "is shown turned by 3" in refused(
        shown_frames, read_footage(path), [Fraction(1)], 64, 96
    )


@pytest.mark.parametrize(
    ("suffix", "turned"), [(".mp4", False), (".mp4", True), (".mkv", False), (".ts", False)]
)
def test_pixels_are_as_wide_as_the_file_says(suffix: str, turned: bool, tmp_path: Path) -> None:
    """A picture of 64×48 with pixels twice as wide is shown as 64×96."""
    video = Video(
        suffix,
        "libx264",
        B,
        change=turn(0, 1, -1, 0) if turned else None,
        draw=lambda i: np.ascontiguousarray(marked(i)[:, ::2]),
        aspect=Fraction(2),
    )
    size = (96, 64) if turned else (64, 96)
    (shown,) = shown_frames(read_footage(video.write(tmp_path)), [Fraction(1)], *size)
    lit = shown[..., 0] > 128
    assert float(lit.float().mean()) == pytest.approx(1 / 16, rel=0.2)
    assert lit[(6, 57)[0], 57 if turned else 6]
