"""Process groups by name. A graph names a group that need not be there before the graph runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

SEQUENCE = "sequence"
"""The group whose ranks share a chunk's frames, and a cache's heads."""

_groups: dict[str, dist.ProcessGroup] = {}


@contextmanager
def registered(name: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Let ops find a process group by a name, within the block."""
    assert name not in _groups, f"there is a group {name!r} already"
    _groups[name] = group
    try:
        yield
    finally:
        del _groups[name]


def find_group(name: str, size: int) -> dist.ProcessGroup:
    """The group that is registered as ``name``, which must have ``size`` ranks.

    Raises:
        ValueError: this process is in no such group, or the group has another size.
    """
    group = _groups.get(name)
    found = 1 if group is None else group.size()
    if group is None or found != size:
        start = f"torchrun --nproc-per-node {size} -m lltk …" if size > 1 else "one process"
        fit = (
            f"passes.ulysses_stream.size={found}"
            if found > 1
            else "no ulysses_stream in its passes"
        )
        raise ValueError(
            f"ranks: the recipe is for {size}, and {found} ran it; start {start}, or take a recipe "
            f"with {fit}"
        )
    return group


def rank_in(name: str, size: int) -> int:
    """This process's rank in a group. A program for one rank needs no group; its rank is 0.

    Raises:
        ValueError: as `find_group`.
    """
    if size == 1 and name not in _groups:
        return 0
    return find_group(name, size).rank()


def same_on_all(value: object, name: str, size: int) -> bool:
    """Whether every rank of a group has an equal value. All ranks must call it."""
    if size == 1:
        return True
    values: list[object] = [None] * size
    dist.all_gather_object(values, value, group=find_group(name, size))
    return all(other == value for other in values)
