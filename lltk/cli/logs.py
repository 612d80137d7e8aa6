"""What a command shows of the library's log, and what it writes to a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from lltk.files.outputs import marked
from lltk.files.writing import append_line

_NEVER = logging.CRITICAL + 1
_MARK = "log of lltk train"
LOG = marked("a run's log", _MARK)


class _File(logging.Handler):
    """Adds messages to a file; raises OSError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        append_line(self._path, self.format(record))


@contextmanager
def logged(console: Console) -> Iterator[Callable[[Path], None]]:
    """Show the library's warnings on a console, and let the caller choose a log file later.

    Yields:
        A function that takes the file's path. From its call on, all messages are appended to the
        file, those from before the call first. Its folder must be there.
    """
    shown = RichHandler(logging.WARNING, console, show_time=False, show_path=False)
    kept = MemoryHandler(1 << 30, flushLevel=_NEVER)
    library = logging.getLogger("lltk")
    before = library.level
    library.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [shown, kept]

    def keep(path: Path) -> None:
        if not path.exists() or not path.stat().st_size:
            append_line(path, f"# {_MARK}")
        file = _File(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for record in kept.buffer:
            file.handle(record)
        library.removeHandler(kept)
        library.addHandler(file)
        handlers.append(file)

    for handler in handlers:
        library.addHandler(handler)
    try:
        yield keep
    finally:
        library.setLevel(before)
        for handler in handlers:
            library.removeHandler(handler)
            handler.close()
