"""Bars that show how far work is."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


def shown_progress(console: Console) -> Progress:
    """What shows bars with their numbers, and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


class Bars:
    """A bar for each work that is under way, beside that of the steps.

    Where the console is no terminal, such as in a pipe, bars are not seen before the end. Lines
    tell instead of every tenth of the work.

    Args:
        progress: shows them.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __call__(self, work: str, done: int, total: int) -> None:
        """Show how much of some work is done; when it is over, its bar goes."""
        if work not in self._tasks:
            self._tasks[work] = self._progress.add_task(work, total=total)
        self._progress.update(self._tasks[work], completed=done)
        tenth = 10 * done // max(1, total)
        if not self._progress.console.is_terminal and self._tenths.get(work) != tenth:
            self._progress.console.print(f"{work}: {done} of {total}", highlight=False)
            self._tenths[work] = tenth
        if done == total:
            self._tenths.pop(work, None)
            self._progress.remove_task(self._tasks.pop(work))
