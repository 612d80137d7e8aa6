"""Live video: fragments give every frame away at once, and each write can start a decoder."""

from __future__ import annotations

import re
from io import BytesIO

import av
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lltk.stream.fragments import CODECS, FragmentWriter

pytestmark = pytest.mark.cpu

HEIGHT, WIDTH, FPS = 64, 96, 16


def numbered(first: int, count: int) -> Tensor:
    """Frames that show their number as a level, brighter to the right: uint8 [F, H, W, 3]."""
    levels = 30 + 3 * torch.arange(first, first + count)
    ramp = torch.linspace(0, 20, WIDTH).int()
    frames = levels[:, None, None, None] + ramp[None, None, :, None]
    return frames.expand(count, HEIGHT, WIDTH, 3).to(torch.uint8)


def decoded(data: bytes) -> Tensor:
    """All frames that can be decoded: uint8 [F, H, W, 3]."""
    with av.open(BytesIO(data)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return torch.stack([torch.from_numpy(frame) for frame in frames])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of any frame's mean level."""
    assert ours.shape == theirs.shape
    levels = [frames.float().mean((1, 2, 3)) for frames in (ours, theirs)]
    return float((levels[0] - levels[1]).abs().max())


def boxes(data: bytes) -> list[str]:
    """The types of the boxes that follow one another."""
    found, place = [], 0
    while place < len(data):
        found.append(data[place + 4 : place + 8].decode())
        place += int.from_bytes(data[place : place + 4], "big")
    return found


def duration(fragment: bytes) -> int:
    """Of the frame in a fragment, in the track's units: the default in its header."""
    header = fragment[fragment.index(b"tfhd") + 4 :]
    assert header[3] & 8, "the header has a default duration"
    return int.from_bytes(header[8:12], "big")


@pytest.mark.parametrize("codec", CODECS)
def test_a_written_chunk_is_wholly_given_away(codec: str) -> None:
    given: list[bytes] = []
    frames = numbered(0, 21)
    with FragmentWriter(given.append, HEIGHT, WIDTH, FPS, codec) as writer:
        assert given == [writer.init_segment] and boxes(given[0]) == ["ftyp", "moov"]
        for chunk in frames.split((9, 12)):
            writer.write(chunk)
            assert len(given) == 1 + writer.frames
            so_far = decoded(b"".join(given))
            assert difference(so_far, frames[: writer.frames]) < 1.5
        count = len(given)
    assert len(given) == count, "closing has nothing left to give"
    assert all(boxes(fragment) == ["moof", "mdat"] for fragment in given[1:])
    assert difference(so_far.roll(1, 0), frames) > 2, "the comparison tells frames apart"
    with pytest.raises(AssertionError):
        difference(decoded(b"".join(given[:-1])), frames)


@pytest.mark.parametrize("codec", CODECS)
def test_a_write_can_start_a_decoder(codec: str) -> None:
    given: list[bytes] = []
    frames = numbered(0, 14)
    with FragmentWriter(given.append, HEIGHT, WIDTH, FPS, codec) as writer:
        writer.write(frames[:5])
        writer.write(frames[5:9])
        writer.write(frames[9:], keyframe=False)
    late = decoded(given[0] + b"".join(given[6:]))
    assert difference(late, frames[5:]) < 1.5
    with av.open(BytesIO(b"".join(given))) as file:
        (stream,) = file.streams.video
        packets = [packet for packet in file.demux(stream) if packet.size]
        assert stream.time_base is not None
        step = 1 / FPS / stream.time_base
    assert [packet.pts for packet in packets] == [k * step for k in range(14)]
    assert {duration(fragment) for fragment in given[1:]} == {step}
    assert [k for k, packet in enumerate(packets) if packet.is_keyframe] == [0, 5]


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("h264", r"avc1\.64[0-9a-f]{4}"),
        ("vp9", r"vp09\.00\.\d\d\.08"),
        ("av1", r"av01\.0\.\d\dM\.08"),
    ],
)
def test_a_browser_is_told_the_codec(codec: str, name: str) -> None:
    with FragmentWriter(lambda data: None, HEIGHT, WIDTH, FPS, codec) as small:
        assert re.fullmatch(name, small.codec_string)
    with FragmentWriter(lambda data: None, 704, 1280, 24, codec) as large:
        assert re.fullmatch(name, large.codec_string)
    assert small.codec_string < large.codec_string, "the level follows the size"


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_chunks_of_any_length(lengths: list[int]) -> None:
    given: list[bytes] = []
    frames = numbered(0, sum(lengths))
    with FragmentWriter(given.append, HEIGHT, WIDTH, FPS) as writer:
        for chunk in frames.split(lengths):
            writer.write(chunk)
            assert len(given) == 1 + writer.frames
    assert difference(decoded(b"".join(given)), frames) < 1.5


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(height: int = 64, width: int = 64, fps: float = 16, codec: str = "h264") -> None:
        FragmentWriter(lambda data: None, height, width, fps, codec)

    with pytest.raises(ValueError, match="nearest that fit: 64 and 66"):
        made(width=65)
    with pytest.raises(ValueError, match="0 frames a second"):
        made(fps=0)
    with pytest.raises(ValueError, match="'hevc' is unknown; choose one of h264, vp9, av1"):
        made(codec="hevc")
    for odd in ({"fps": 1000}, {"height": 2, "width": 2}):
        with pytest.raises(ValueError, match=r"codec: av1 is not encoded in .* choose another of"):
            made(codec="av1", **odd)  # type: ignore[arg-type]
    with (
        FragmentWriter(lambda data: None, 64, 64, 16) as writer,
        pytest.raises(ValueError, match=r"uint8 \[F, 64, 64, 3\] is required"),
    ):
        writer.write(torch.zeros(2, 3, 64, 64))

    def missing(*_: object) -> None:
        raise av.codec.codec.UnknownCodecError("libx264")

    monkeypatch.setattr(av.codec, "Codec", missing)
    with pytest.raises(ValueError, match=r"needs FFmpeg's encoder libx264, which .* lacks"):
        made()
