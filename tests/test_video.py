"""Videos are written as they come, survive their writer, and keep their colours."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lltk.stream.video import KEYFRAME_EVERY, VideoWriter, contact_sheet, read_video

pytestmark = pytest.mark.cpu

SIDE = 64


def numbered(first: int, count: int) -> Tensor:
    """Frames that show their number: a level of 4 · (number mod 60), and a ramp on top."""
    levels = 4 * (torch.arange(first, first + count) % 60)
    ramp = torch.linspace(0, 16, SIDE).int()
    frames = levels[:, None, None, None] + ramp[None, None, :, None]
    return frames.expand(count, SIDE, SIDE, 3).to(torch.uint8)


def noise(count: int) -> Tensor:
    """Frames of noise, which no codec makes small."""
    shape = (count, SIDE, SIDE, 3)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of any frame's mean level."""
    levels = [frames.float().mean((1, 2, 3)) for frames in (ours, theirs)]
    return float((levels[0] - levels[1]).abs().max())


@pytest.mark.parametrize("threads", [1, 4])
def test_frames_come_back_in_order(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "new" / "folder" / "video.mp4"
    frames = numbered(0, 61)
    with VideoWriter(path, SIDE, SIDE, 24, threads) as video:
        for chunk in frames.split((29, 32)):
            video.write(chunk)
    video.close()
    assert video.frames == 61
    back = read_video(path)
    assert back.shape == frames.shape and back.dtype == torch.uint8
    assert difference(back, frames) < 1
    assert difference(back.roll(1, 0), frames) > 3, "the comparison tells frames apart"


@pytest.mark.parametrize("fps", [8, 24, 29.97])
def test_the_rate_is_kept(tmp_path: Path, fps: float) -> None:
    import av

    with VideoWriter(tmp_path / "video.mp4", SIDE, SIDE, fps) as video:
        video.write(numbered(0, 30))
    with av.open(tmp_path / "video.mp4") as file:
        stream = file.streams.video[0]
        assert float(stream.average_rate or 0) == pytest.approx(fps)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert sum(1 for _ in file.decode(video=0)) == 30


def test_colours_are_kept_and_tagged(tmp_path: Path) -> None:
    """Read as BT.709 they are right. Read as BT.601, as a file without tags is, they are not."""
    import av

    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [10, 200, 90]])
    frames = colours.to(torch.uint8)[:, None, None].expand(-1, SIDE, SIDE, -1)
    path = tmp_path / "video.mp4"
    with VideoWriter(path, SIDE, SIDE, 24) as video:
        video.write(frames)

    def error(back: Tensor) -> int:
        return int((back.int() - frames.int()).abs().max())

    assert error(read_video(path)) <= 4
    with av.open(path) as file:
        wrong = [
            torch.from_numpy(frame.reformat(format="rgb24", src_colorspace="ITU601").to_ndarray())
            for frame in file.decode(video=0)
        ]
    assert error(torch.stack(wrong)) > 15


WRITE_FOREVER = """
import av
from pathlib import Path
from lltk.stream.video import VideoWriter
from test_video import SIDE, numbered

folder = Path(sys.argv[1])
plain = av.open(folder / "plain.mp4", "w")
stream = plain.add_stream("libx264", rate=24, options={"tune": "zerolatency"})
stream.width = stream.height = SIDE
with VideoWriter(folder / "video.mp4", SIDE, SIDE, 24) as video:
    while True:
        frames = numbered(video.frames, 8)
        for pixels in frames.numpy():
            plain.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        video.write(frames)
        print(video.frames, flush=True)
"""


def test_a_killed_writer_leaves_a_video(tmp_path: Path) -> None:
    """It loses a fragment at most; the plain MP4 written beside it is lost whole."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{WRITE_FOREVER}"
    command = [sys.executable, "-c", code, str(tmp_path)]
    written = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            written = int(line)
            if written >= 40:
                writer.kill()
    assert writer.returncode == -signal.SIGKILL and written >= 40
    back = read_video(tmp_path / "video.mp4")
    assert len(back) >= written - KEYFRAME_EVERY
    assert difference(back, numbered(0, len(back))) < 1
    with pytest.raises(ValueError, match=r"plain\.mp4: holds no frame that can be decoded"):
        read_video(tmp_path / "plain.mp4")


def test_an_error_in_between_leaves_every_frame(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, SIDE, SIDE, 24) as video:
        video.write(numbered(0, 31))
        raise KeyboardInterrupt
    assert len(read_video(path)) == 31


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond some bytes. A write that would is cut off, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("into", [4, 40, 90, 400], ids=lambda n: f"{n} bytes into a fragment")
def test_a_full_disk_is_one_message_and_a_video(tmp_path: Path, into: int) -> None:
    """It is cut back to whole fragments: a cut inside a fragment's header loses the whole file."""
    path, frames = tmp_path / "video.mp4", noise(60)
    with VideoWriter(path, SIDE, SIDE, 24) as video:
        video.write(frames)
    whole = path.read_bytes()
    assert len(whole) > 150_000, "a smaller disk is too small for pytest itself"
    size = whole.index(b"moof", 100_000) - 4 + into

    path.write_bytes(whole[:size])
    if into == 40:
        with pytest.raises(ValueError, match="holds no frame"):
            read_video(path)

    video = VideoWriter(path, SIDE, SIDE, 24)
    with disk_of(size), pytest.raises(OSError) as caught, video:
        for frame in frames.split(1):
            video.write(frame)
    found = re.fullmatch(
        r"video: .*video\.mp4: cannot be written \(File too large\); the first (\d+) frames "
        r"\((.*) s\) are there and play; name a path with room to write",
        str(caught.value),
    )
    assert found
    kept, back = int(found[1]), read_video(path)
    assert video.frames - KEYFRAME_EVERY <= kept == len(back)
    assert float(found[2]) == pytest.approx(kept / 24, abs=0.05)
    assert difference(back, frames[:kept]) < 2


@pytest.mark.parametrize("missing", [1, 50_000])
def test_a_disk_full_at_the_end(tmp_path: Path, missing: int) -> None:
    """The last frame is written when the file is closed, and does not fit, even by one byte."""
    path, frame = tmp_path / "video.mp4", noise(1).repeat(1, 8, 8, 1)
    with VideoWriter(path, 8 * SIDE, 8 * SIDE, 24) as video:
        video.write(frame)
    size = path.stat().st_size
    video = VideoWriter(path, 8 * SIDE, 8 * SIDE, 24)
    video.write(frame)
    with (
        disk_of(size - missing),
        pytest.raises(OSError, match=r"\(File too large\); nothing was kept"),
    ):
        video.close()
    assert path.stat().st_size == size and len(read_video(path)) == 1, "the old one is there"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_no_place_for_a_video(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").symlink_to("/dev/null")
    with pytest.raises(OSError, match="it is no file"):
        VideoWriter(tmp_path / "video.mp4", SIDE, SIDE, 24)


def test_a_video_that_another_writer_replaced_is_said(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    one, other = (VideoWriter(path, SIDE, SIDE, 24) for _ in range(2))
    one.write(numbered(0, 30))
    other.write(numbered(0, 40))
    with pytest.raises(OSError, match="another process has replaced it"):
        one.close()
    other.close()
    assert len(read_video(path)) == 40


def test_a_disk_full_from_the_start(tmp_path: Path) -> None:
    with (
        disk_of(10),
        pytest.raises(OSError, match=r"\(File too large\); nothing was kept"),
    ):
        VideoWriter(tmp_path / "video.mp4", SIDE, SIDE, 24)
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for path in (
        tmp_path / "folder.mp4",
        tmp_path / "file" / "video.mp4",
        tmp_path / "file" / "a" / "b.mp4",
    ):
        with pytest.raises(
            OSError, match=r"^.*: cannot be written \(.*\); make room, or name another$"
        ):
            VideoWriter(path, SIDE, SIDE, 24)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((63, 64, 24), r"height of 63 pixels: .* nearest that fit: 62 and 64"),
        ((64, 1, 24), r"width of 1 pixels: .* nearest that fit: 2 and 4"),
        ((64, 64, 0), r"0 frames a second: video.mp4 takes from 1 to 1000"),
        ((64, 64, float("nan")), r"nan frames a second"),
    ],
)
def test_misfit_sizes(tmp_path: Path, sizes: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoWriter(tmp_path / "video.mp4", *sizes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames", [torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8), torch.zeros(2, SIDE, SIDE, 3)]
)
def test_misfit_frames(tmp_path: Path, frames: Tensor) -> None:
    with VideoWriter(tmp_path / "video.mp4", SIDE, SIDE, 24) as video:
        with pytest.raises(ValueError, match=r"uint8 \[F, 64, 64, 3\] is required"):
            video.write(frames)
        video.write(numbered(0, 3))
    assert len(read_video(tmp_path / "video.mp4")) == 3


def test_contact_sheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    shots = [("a circle", numbered(0, 29)), ("красный 円 " * 40, numbered(29, 1))]
    contact_sheet(path, shots, columns=4)
    sheet = Image.open(path)
    row = sheet.height // 2
    assert sheet.width == 4 * SIDE and row > SIDE
    for i, (_, frames) in enumerate(shots):
        bottom = (i + 1) * row
        for j, k in enumerate(torch.linspace(0, len(frames) - 1, 4).round().int().tolist()):
            tile = sheet.crop((j * SIDE, bottom - SIDE, (j + 1) * SIDE, bottom))
            assert tile.tobytes() == frames[k].numpy().tobytes()
        label = sheet.crop((0, bottom - row, sheet.width, bottom - SIDE)).convert("L")
        assert label.getextrema()[0] < 100 and label.getextrema()[1] == 255
    assert list(tmp_path.iterdir()) == [path]


def test_contact_sheet_scales_large_frames(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", [("a", torch.zeros(2, 352, 640, 3, dtype=torch.uint8))])
    assert Image.open(tmp_path / "sheet.png").width == 6 * 192
