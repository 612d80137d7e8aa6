"""The suffix of a video's path decides its form."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from helpers import refused
from PIL import Image
from test_video import SIDE, difference, disk_of, noise, numbered
from torch import Tensor

from lltk.files.outputs import Output, check_outputs
from lltk.stream.forms import FORMS, form_of
from lltk.stream.frame_folder import FrameFolder, open_writer
from lltk.stream.video import VIDEO, VideoWriter, read_video

pytestmark = pytest.mark.cpu

FPS = 16


def written(path: Path, frames: Tensor) -> Path:
    with open_writer(path, SIDE, SIDE, FPS) as video:
        for part in frames.split((13, len(frames) - 13)):
            video.write(part)
    return path


def animation(path: Path) -> tuple[Tensor, list[int]]:
    """The frames of a GIF or WebP, and their durations in ms."""
    frames, durations = [], []
    with Image.open(path) as file:
        for index in range(file.n_frames):
            file.seek(index)
            frames.append(torch.tensor(list(file.convert("RGB").tobytes()), dtype=torch.uint8))
            durations.append(file.info["duration"])
    return torch.stack(frames).view(-1, SIDE, SIDE, 3), durations


@pytest.mark.parametrize(
    ("name", "container", "codec"),
    [
        ("v.mp4", "mp4", "h264"),
        ("v.MP4", "mp4", "h264"),
        ("v.mkv", "matroska", "h264"),
        ("v.webm", "webm", "vp9"),
        ("v.gif", "gif", "gif"),
    ],
)
def test_the_file_is_what_its_suffix_says(
    tmp_path: Path, name: str, container: str, codec: str
) -> None:
    import av

    frames = numbered(0, 30)
    path = written(tmp_path / name, frames)
    with av.open(path) as file:
        assert container in file.format.name.split(",")
        assert file.streams.video[0].codec_context.name == codec
        times = [float(frame.time) for frame in file.decode(video=0)]
    assert times == pytest.approx([n / FPS for n in range(30)], abs=0.006)
    assert path.read_bytes()[:4] == b"\x1aE\xdf\xa3" or container in ("mp4", "gif")
    assert difference(read_video(path), frames) < 2


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_has_every_frame_and_loops(tmp_path: Path, suffix: str) -> None:
    frames = numbered(0, 30)
    path = written(tmp_path / f"v{suffix}", frames)
    back, durations = animation(path)
    assert difference(back, frames) < 2
    assert sum(durations) == pytest.approx(30 / FPS * 1000, abs=15)
    with Image.open(path) as file:
        assert file.format == suffix[1:].upper() and file.info["loop"] == 0


@pytest.mark.parametrize("suffix", list(FORMS))
def test_a_video_of_lltk_is_recognised(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"v{suffix}", numbered(0, 15))
    check_outputs([Output(path, VIDEO)], [])
    frames = read_video(path) if suffix != ".webp" else animation(path)[0]
    assert len(frames) == 15
    path.write_bytes(path.read_bytes().replace(b"made by lltk stream", b"made by others, and"))
    assert "did not write it as a video" in refused(check_outputs, [Output(path, VIDEO)], [])


def test_a_name_without_a_suffix_is_a_folder_of_frames(tmp_path: Path) -> None:
    frames = numbered(0, 15)
    folder = written(tmp_path / "new" / "frames", frames)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"frame_{n:05d}.png" for n in range(15)]
    for file, frame in zip(files, frames, strict=True):
        assert Image.open(file).tobytes() == frame.numpy().tobytes()
    assert "is not empty; name a new folder" in refused(FrameFolder, folder)


def test_frames_are_on_the_disk_before_they_have_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for each, and one for their names; what cannot be written leaves nothing."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda given: (calls.append("sync"), sync(given)))
    monkeypatch.setattr(os, "replace", lambda *given: (calls.append("name"), replace(*given)))
    folder = tmp_path / "frames"
    folder.mkdir()
    with FrameFolder(folder) as writer:
        writer.write(numbered(0, 2))
    assert calls == ["sync", "name", "sync", "name", "sync"]
    monkeypatch.undo()
    more = FrameFolder(tmp_path / "more")
    more.write(numbered(0, 2))
    with disk_of(64), pytest.raises(OSError, match=r"\(File too large\); the first 2 frames are"):
        more.write(numbered(2, 1))
    assert sorted(file.name for file in (tmp_path / "more").iterdir()) == [
        "frame_00000.png", "frame_00001.png"
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".avi", ".txt", ".mov", ".png"])
def test_other_suffixes_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    for make in (form_of, lambda path: VideoWriter(path, SIDE, SIDE, FPS)):
        assert f"cannot be written as {suffix}; use .mp4, .mkv" in refused(make, path)
    assert "names no form of video" in refused(VideoWriter, tmp_path / "v", SIDE, SIDE, FPS)
    assert not list(tmp_path.iterdir())


def test_a_gif_cannot_be_faster_than_its_clock(tmp_path: Path) -> None:
    message = refused(VideoWriter, tmp_path / "v.gif", SIDE, SIDE, 60)
    assert "v.gif takes from 1 to 50" in message


@pytest.mark.parametrize("suffix", [form for form in FORMS if form != ".webp"])
def test_what_is_cut_off_by_a_full_disk_plays(tmp_path: Path, suffix: str) -> None:
    path, frames = tmp_path / f"v{suffix}", noise(60)
    size = len(written(path, frames).read_bytes()) * 2 // 3
    assert size > 100_000, "a smaller disk is too small for pytest itself"
    video = VideoWriter(path, SIDE, SIDE, FPS)
    with disk_of(size), pytest.raises(OSError) as caught, video:
        for frame in frames.split(1):
            video.write(frame)
    (kept,) = re.findall(r"the first (\d+) frames", str(caught.value))
    assert 20 < int(kept) == len(read_video(path))
