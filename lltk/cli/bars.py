"""Bars that show how far work is."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

_BETWEEN = 30.0
"""Seconds between lines of steps, at least."""


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


class Steps:
    """The bar of a run's steps.

    Where bars are not seen, lines tell of the first step and the last, and now and then of others.

    Args:
        progress: shows the bar.
        done: steps that are done already.
        total: how many there are.
        clock: gives seconds.
    """

    def __init__(
        self,
        progress: Progress,
        done: int,
        total: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = progress
        self._total = total
        self._clock = clock
        self._bar = progress.add_task("", total=total, completed=done)
        self._due = clock()

    def __call__(self, done: int, text: str) -> None:
        """Show that so many steps are done, and what there is to say of the last."""
        self._progress.update(self._bar, completed=done, description=text)
        now, console = self._clock(), self._progress.console
        if not console.is_terminal and (now >= self._due or done == self._total):
            console.print(f"step {done} of {self._total}: {text}", highlight=False)
            self._due = now + _BETWEEN
