"""Telling how far long work has come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Note = Callable[[str, int, int], None]
"""Takes the name of some work, how many of its parts are done, and how many there are."""


def silent(work: str, done: int, total: int) -> None:
    """Tell nobody."""


def noted(parts: Iterable[T], work: str, total: int, note: Note) -> Iterator[T]:
    """The parts of some work, which is noted before each part and after the last.

    Args:
        parts: as many as ``total``.
        work: its name.
        total: how many there are.
        note: takes it.
    """
    for done, part in enumerate(parts):
        note(work, done, total)
        yield part
    note(work, total, total)
