"""Files and folders written whole: at any interruption the old one or the new one is there.

What is new is written beside its place, brought to the disk, and renamed. A file takes the place of
another in one step. A folder cannot: the old one is renamed first, to a name that `standing` and
every later writer know. A link is followed, and what it points to is written.

What a killed writer leaves beside the place is removed by the next writer of the same name. A
living writer holds a lock on what it writes, so that no other removes it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SMALL = 1 << 16
"""Bytes that are hashed sooner than another thread would begin."""
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class NewFile(io.RawIOBase):
    """A file that is being written. Large writes are hashed while the disk takes them.

    Its methods raise OSError where it cannot be written.

    Args:
        descriptor: of an empty file; closed with this.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._hash = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        """Write all of the data."""
        view = memoryview(data).cast("B")
        if len(view) <= _SMALL:
            self._hash.update(view)
            self._write(view)
        else:
            hashed = self._hashing.submit(self._hash.update, view)
            try:
                self._write(view)
            finally:
                hashed.result()
        return len(view)

    def _write(self, left: memoryview) -> None:
        while left:
            left = left[os.write(self._descriptor, left) :]

    def patch(self, offset: int, data: bytes) -> None:
        """Replace bytes that were written; the checksum stays that of what `write` was given."""
        os.pwrite(self._descriptor, data, offset)

    @property
    def checksum(self) -> str:
        """The SHA-256 of what was written so far, as hexadecimal digits."""
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Wait until the disk has it."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._hashing.shutdown()
            os.close(self._descriptor)


class NewFolder:
    """A folder that is being written.

    Attributes:
        path: where it is until it is whole. Files that others write there are kept too.
        checksums: of the files that were written through `file`, by their names in the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checksums: dict[str, str] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[NewFile]:
        """A file in the folder, which may have slashes in its name."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with NewFile(os.open(path, _NEW, 0o666)) as file:
            yield file
            self.checksums[name] = file.checksum

    def write_text(self, name: str, text: str) -> None:
        """Write a file of text, in UTF-8."""
        with self.file(name) as file:
            file.write(text.encode())


@contextmanager
def whole_file(path: Path) -> Iterator[NewFile]:
    """Gives a file to write, which takes the place of ``path`` when the block ends without error.

    Missing parent folders are made.

    Raises:
        OSError: it cannot be written, or there is something other than a file. What was there is
            as it was.
    """
    with explained(path):
        place = prepared(path)
        if place.exists() and not place.is_file():
            raise OSError(errno.EEXIST, "it is no file")
        with new_file(place) as file:
            yield file
        sync_folder(place.parent)


@contextmanager
def new_file(place: Path) -> Iterator[NewFile]:
    """Gives a file to write, which gets its name when the block ends without error.

    It is on the disk by then. Its name is once `sync_folder` was called.
    """
    temporary, descriptor = claimed(place)
    try:
        with NewFile(descriptor) as file:
            yield file
            file.sync()
            os.replace(temporary, place)
    finally:
        _remove(temporary)


@contextmanager
def whole_folder(path: Path) -> Iterator[NewFolder]:
    """Gives a folder to write, which takes the place of ``path`` when the block ends without error.

    Missing parent folders are made. A folder that is there is replaced with all that it holds.

    Raises:
        OSError: it cannot be written, or there is something other than a folder. What was there is
            as it was.
    """
    with explained(path):
        place = prepared(path)
        if place.exists() and not place.is_dir():
            raise OSError(errno.EEXIST, "it is no folder")
        temporary, descriptor = claimed(place, folder=True)
        try:
            yield NewFolder(temporary)
            _sync_tree(temporary)
            _settle(place)
            _exchange(temporary, place)
        finally:
            os.close(descriptor)
            _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a file of text, in UTF-8; errors as `whole_file`'s."""
    with whole_file(path) as file:
        file.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Add a line to a file of text, in UTF-8.

    A kill or a full disk may cut it short. What was cut short before stays a line of its own.

    Raises:
        OSError: it cannot be written.
    """
    with explained(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def standing(path: Path) -> Path:
    """Where a folder is: at its path, or beside it if a kill came while another took its place."""
    aside = _aside(_place_of(path))
    return aside if not path.exists() and aside.exists() else path


def remove_whole(path: Path) -> None:
    """Remove a file or a folder. Even if the process is killed meanwhile, its name is free."""
    _discard(path, path)


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder, and nothing that a living one is writing.

    Args:
        folder: to look in.
        name: of what they were writing; None for any.
    """
    wanted = "*" if name is None else glob.escape(name)
    for left in folder.glob(f".{wanted}.{'[0-9a-f]' * 32}.lltk-new"):
        with suppress(OSError):  # another writer is faster, or is writing it
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
            finally:
                os.close(descriptor)


def claimed(place: Path, folder: bool = False) -> tuple[Path, int]:
    """Make an empty file or folder beside a place, and remove what killed writers left there.

    Returns:
        Its path, and a descriptor: until that is closed, `remove_unfinished` leaves it alone.
    """
    remove_unfinished(place.parent, place.name)
    while True:
        path = beside(place)
        if folder:
            os.mkdir(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC if folder else _NEW, 0o666)
        with suppress(OSError):  # where there are no locks, nothing is removed either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return path, descriptor
        os.close(descriptor)  # another writer took it for a left one before it was locked


def sync(path: Path) -> None:
    """Wait until the disk has a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(path: Path) -> Path:
    """A free path in the same folder; `remove_unfinished` knows its form."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.lltk-new")


def _aside(path: Path) -> Path:
    """Where a folder waits while another takes its place."""
    return path.with_name(f".{path.name}.lltk-old")


def _settle(place: Path) -> None:
    """End the exchange of a folder that a kill has interrupted."""
    aside = _aside(place)
    if aside.exists():
        if place.exists():
            _discard(aside, place)
        else:
            os.rename(aside, place)


def _exchange(new: Path, place: Path) -> None:
    """Let a folder take the place of another, if there is one."""
    aside = _aside(place)
    old = place.exists()
    if old:
        os.rename(place, aside)
    try:
        os.rename(new, place)
    except BaseException:
        if old:
            os.rename(aside, place)
        raise
    sync_folder(place.parent)
    if old:
        _discard(aside, place)


def _discard(path: Path, place: Path) -> None:
    """Remove a file or a folder, under a name as if it were being written to a place."""
    going = beside(place)
    os.rename(path, going)
    _remove(going)


def _place_of(path: Path) -> Path:
    """What a path names, behind all links."""
    return Path(os.path.realpath(path))


def prepared(path: Path) -> Path:
    """What a path names, behind all links; makes its missing folders."""
    place = _place_of(path)
    if place.is_symlink():
        raise OSError(errno.ELOOP, "its links lead in a circle")
    missing = [folder for folder in place.parents if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    return place


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent) / name)
        sync_folder(Path(parent))


def sync_folder(path: Path) -> None:
    """Wait until the disk has a folder's names. Some file systems know no such thing."""
    try:
        sync(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _remove(path: Path) -> None:
    """Remove what is there, as far as that is possible: it is no harm where it is."""
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Let an OSError say which file it is about, and what to do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{path}: cannot be written ({why}); make room, or name another") from error
