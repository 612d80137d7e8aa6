"""A rank by itself, for measuring and tests: its exchanges are copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lltk.parallel.groups import SEQUENCE, registered


class Alike(dist.ProcessGroup):
    """Stands for a group in which every rank holds what this one does.

    An exchange writes as many bytes as one among real ranks, on the device.
    """

    def swapped(self, sent: Tensor) -> Tensor:
        """What all ranks would send to this one: its own row of [size, …], so often."""
        own = self.rank()
        return sent[own : own + 1].repeat(self.size(), *[1] * (sent.dim() - 1))


@contextmanager
def alike(size: int, rank: int = 0) -> Iterator[None]:
    """Let this process run a rank's passes alone, within the block."""
    make: Any = Alike  # torch's stubs do not have this constructor
    with registered(SEQUENCE, make(rank, size)):
        yield
