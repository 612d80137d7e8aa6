"""What a command shows and keeps of the library's log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

_NEVER = logging.CRITICAL + 1


def hide_loading(speaks: bool = True) -> None:
    """Keep transformers from drawing a bar of its own when it loads a model.

    Args:
        speaks: whether warnings are shown; of several ranks one shows them.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not speaks:
        logging.disable(logging.WARNING)


@contextmanager
def logged(console: Console) -> Iterator[Callable[[Path], None]]:
    """Show warnings on a console; from the call of what this gives on, append all to a file.

    What was logged before that call is kept for it.
    """
    shown = RichHandler(logging.WARNING, console, show_time=False, show_path=False)
    kept = MemoryHandler(1 << 30, flushLevel=_NEVER)
    library = logging.getLogger("lltk")
    before = library.level
    library.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [shown, kept]

    def keep(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
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
