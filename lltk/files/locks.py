"""A folder for one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lltk.files.outputs import Output, marked

_NAME = "run.lock"
_MARK = "held by an lltk process:"


def lock_output(folder: Path, file: Path | None = None) -> Output:
    """The file that `held` writes."""
    return Output(file or folder / _NAME, marked("a lock", _MARK))


@contextmanager
def held(folder: Path, file: Path | None = None) -> Iterator[None]:
    """Keep other processes from holding a folder too, as long as the block runs.

    The lock is on a file, which stays. The system lets go of it with the process, however that
    ends.

    Args:
        folder: made if it is not there.
        file: the file; None for ``run.lock`` in the folder.

    Raises:
        ValueError: another process holds the folder.
        OSError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file or folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 64, 0).decode("ascii", "replace").split()[-1:]
            raise ValueError(
                f"{folder}: is in use by process {''.join(owner)}; wait until that has ended, or "
                "name another folder"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{_MARK} {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
