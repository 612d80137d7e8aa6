"""A video as a folder of PNG frames."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol

from torch import Tensor

from lltk.files.outputs import Kind
from lltk.files.writing import beside
from lltk.stream.forms import form_of
from lltk.stream.video import VideoWriter

FRAMES = Kind("a folder of frames", lambda path: False, folder=True)
"""Never replaced: frames of two videos would be one."""


class Writer(Protocol):
    """Writes a video's frames as they arrive. A context manager; after it the video is whole."""

    def write(self, frames: Tensor) -> None:
        """Append frames, uint8 [F, H, W, 3] on the CPU."""

    def close(self) -> None:
        """Finish; closing again does nothing."""

    def __enter__(self) -> Writer: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class FrameFolder:
    """Writes frames as ``frame_00000.png``, ``frame_00001.png``, … to a folder.

    Args:
        path: the folder. It is made if it is missing; it must be empty.

    Raises:
        ValueError: something is in the folder.
    """

    def __init__(self, path: Path) -> None:
        check_form(path)
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._frames = 0

    def write(self, frames: Tensor) -> None:
        """Append frames, uint8 [F, H, W, 3] on the CPU.

        Raises:
            OSError: a file cannot be written.
        """
        from PIL import Image

        for pixels in frames.numpy():
            file = self._path / f"frame_{self._frames:05d}.png"
            temporary = beside(file)
            Image.fromarray(pixels).save(temporary, format="PNG")
            temporary.rename(file)
            self._frames += 1

    def close(self) -> None:
        """Nothing is left to do: each frame is whole when it is written."""

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_form(path: Path, folder: bool = False) -> None:
    """Refuse a path that no video can be written to.

    Args:
        path: of a file or a folder of frames.
        folder: whether it is a folder of videos instead.

    Raises:
        ValueError: its suffix names no form, or it is a file or folder with something in it that
            should be a new folder.
    """
    if not folder and form_of(path) is not None:
        return
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; name a folder, or a file with a video's suffix")
    if not folder and path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path}: is not empty; name a new folder for the frames")


def open_writer(path: Path, height: int, width: int, fps: float, threads: int = 1) -> Writer:
    """A writer of the form that the path's suffix names; without one, of a folder of frames.

    Args:
        path: the file or folder.
        height, width, fps, threads: see `VideoWriter`.

    Raises:
        ValueError: as `form_of`, `VideoWriter` and `FrameFolder`.
        OSError: it cannot be written.
    """
    if form_of(path) is None:
        return FrameFolder(path)
    return VideoWriter(path, height, width, fps, threads)
