"""A video as a folder of PNG frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, cast

from torch import Tensor

from lltk.files.outputs import Kind
from lltk.files.writing import new_file, prepared, sync_folder
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

    Each frame is whole, or is not there. All are on the disk once the writer is closed.

    Args:
        path: the folder. It is made if it is missing; it must be empty.

    Raises:
        ValueError: something is in the folder.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        check_form(path)
        self._path = path
        self._frames = 0
        with self._writing():
            self._folder = prepared(path / _name(0)).parent

    def write(self, frames: Tensor) -> None:
        """Append frames, uint8 [F, H, W, 3] on the CPU.

        Raises:
            OSError: a file cannot be written; the message says how many are there.
        """
        from PIL import Image

        for pixels in frames.numpy():
            with self._writing(), new_file(self._folder / _name(self._frames)) as file:
                Image.fromarray(pixels).save(cast(IO[bytes], file), format="PNG")
            self._frames += 1

    def close(self) -> None:
        """Wait until the disk has the frames' names; errors as `write`'s."""
        with self._writing():
            sync_folder(self._folder)

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"video: {self._path}: cannot be written ({error.strerror}); the first "
                f"{self._frames} frames are there; name a path with room to write"
            ) from error


def _name(frame: int) -> str:
    return f"frame_{frame:05d}.png"


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
