"""Process groups by name. A graph names a group that need not be there before the graph runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lltk.parallel.transfer import download

SEQUENCE = "sequence"
"""The group whose ranks share the frames of a chunk or a clip, and the heads of attention."""

SHARDS = "shards"
"""The group whose ranks have a part each of the weights, if there are several."""

FRAMES = "frames"
"""The same ranks, for the parts of frames that they send while the next chunk is in flight. They
travel through main memory, so that they never wait for an exchange on the GPUs, nor it for them."""

_groups: dict[str, dist.ProcessGroup] = {}


class LostRank(ValueError):
    """An exchange failed because another rank has stopped, or its link has."""


@contextmanager
def registered(name: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Let ops find a process group by a name, within the block."""
    assert name not in _groups, f"there is a group {name!r} already"
    _groups[name] = group
    try:
        yield
    finally:
        del _groups[name]


@contextmanager
def regrouped(name: str, size: int) -> Iterator[None]:
    """Let a name stand for groups of ``size`` consecutive ranks instead, within the block.

    All ranks must call it. Their number is a multiple of the size.
    """
    before = _groups.pop(name, None)
    own, _ = dist.new_subgroups(size)
    try:
        with registered(name, own):
            yield
    finally:
        if before is not None:
            _groups[name] = before


def find_group(name: str, size: int) -> dist.ProcessGroup:
    """The group that is registered as ``name``, which must have ``size`` ranks.

    Raises:
        ValueError: this process is in no such group, or the group has another size.
    """
    group = _groups.get(name)
    found = 1 if group is None else group.size()
    if group is None or found != size:
        start = f"torchrun --nproc-per-node {size} -m lltk …" if size > 1 else "one process"
        passes = "ulysses_stream (balanced_sp or naive_sp where it trains)"
        fit = f"whose {passes} has size {found}" if found > 1 else f"without {passes}"
        raise ValueError(
            f"ranks: the recipe is for {size}, and {found} ran it; start {start}, or take a recipe "
            f"{fit}"
        )
    return group


def gathered(own: Tensor, shapes: Sequence[Sequence[int]], name: str) -> list[Tensor]:
    """The parts of all ranks of a group, at its first rank; none at the others.

    All ranks must call it, in the same order.

    Args:
        own: this rank's part, on any device.
        shapes: of every rank's part; all have the dtype of this one.
        name: of the group, whose backend exchanges main memory.

    Returns:
        The parts on this rank's device.

    Raises:
        LostRank: another rank has stopped.
    """
    group = find_group(name, len(shapes))
    try:
        if group.rank() > 0:
            dist.send(download(own), group=group, group_dst=0)
            return []
        parts = [own]
        for rank, shape in enumerate(shapes[1:], 1):
            part = torch.empty(tuple(shape), dtype=own.dtype, pin_memory=own.is_cuda)
            dist.recv(part, group=group, group_src=rank)
            parts.append(part.to(own.device, non_blocking=True))
    except RuntimeError as error:
        raise lost(error) from error
    return parts


def hand_on(sent: Tensor, name: str, size: int) -> None:
    """Send a contiguous tensor to the next rank of a group, which takes it by `receive`.

    The first rank is the next one of the last. A rank sends and receives in turns, since NCCL
    connects two ranks in an exchange that both begin in the same way.

    Raises:
        LostRank: another rank has stopped.
    """
    _move(dist.isend, sent, 1, name, size)


def receive(awaited: Tensor, name: str, size: int) -> None:
    """Put what the rank before hands on into a contiguous tensor; errors as `hand_on`'s."""
    _move(dist.irecv, awaited, -1, name, size)


def _move(move: Callable[..., Any], x: Tensor, step: int, name: str, size: int) -> None:
    """Exchange a tensor with the rank that is so many steps on."""
    group = find_group(name, size)
    other = (group.rank() + step) % size
    # As bytes, since a backend may not know the dtype.
    operation = dist.P2POp(move, x.view(torch.uint8), group=group, group_peer=other)
    try:
        for work in dist.batch_isend_irecv([operation]):
            work.wait()
    except RuntimeError as error:
        raise lost(error) from error


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


def lost(error: RuntimeError) -> LostRank:
    """What to raise where a backend says that an exchange failed."""
    reason = str(error).strip().splitlines()[0]
    return LostRank(f"ranks: an exchange failed, another rank has stopped ({reason}); start again")
