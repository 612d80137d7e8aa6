"""What rank 0 tells the other ranks to do, one thing after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch import OutOfMemoryError

from lltk.parallel.groups import LostRank, lost

FAILURES = (ValueError, OSError, OutOfMemoryError)
"""What is raised where a rank cannot do something, and then goes on."""
_EVER = timedelta(days=10_000)
"""How long a rank waits for an order: nothing has to happen for days."""


class Orders:
    """Brings rank 0's orders to all other ranks. All ranks must make it, in the same order.

    Args:
        size: how many ranks there are, two or more.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._group = dist.new_group(timeout=_EVER, backend="gloo")
        self._broken = False

    def give(self, order: object) -> None:
        """Tell the other ranks; for rank 0 alone, one thread at a time.

        Raises:
            LostRank: another rank has stopped, or `break_off` was called.
        """
        if self._broken:
            raise LostRank("ranks: they have parted; start again")
        self._told([order])

    def take(self) -> object:
        """What rank 0 tells next; for the other ranks.

        Raises:
            LostRank: another rank has stopped.
        """
        order: list[object] = [None]
        self._told(order)
        return order[0]

    def _told(self, order: list[object]) -> None:
        try:
            dist.broadcast_object_list(order, src=0, group=self._group)
        except RuntimeError as error:
            raise lost(error) from error

    def break_off(self) -> None:
        """Give no more orders: this rank is not where the others are."""
        self._broken = True

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks do a block, or know that one of them could not. All ranks must enter it.

        Raises:
            ValueError, OSError, OutOfMemoryError: what this rank's block raised; else ValueError,
                where another's raised any of these.
            LostRank: another rank has stopped.
        """
        failure: ValueError | OSError | OutOfMemoryError | None = None
        try:
            yield
        except LostRank:
            raise
        except FAILURES as error:
            failure = error
        said: list[str] = [""] * self._size
        own = "" if failure is None else str(failure) or type(failure).__name__
        try:
            dist.all_gather_object(said, own, self._group)
        except RuntimeError as error:
            raise lost(error) from error
        if failure is not None:
            raise failure
        for rank, reason in enumerate(said):
            if reason:
                raise ValueError(f"rank {rank}: {reason}")
