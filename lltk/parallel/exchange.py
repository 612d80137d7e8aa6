"""``lltk::`` ops that move a chunk between ranks; no gradient flows through them.

``group`` is a name that is resolved when an op runs (`lltk.parallel.groups`) and ``size`` the
number of its ranks, so that shapes are known without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lltk.parallel.groups import find_group


class LostRank(ValueError):
    """An exchange failed because another rank has stopped, or its link has."""


@torch.library.custom_op("lltk::tokens_to_heads", mutates_args=())
def tokens_to_heads(values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    """See `reference.tokens_to_heads`, for several tensors at once: [B, l, H, …] each."""
    return _heads(_start(_blocks(values, size), size, group))


@tokens_to_heads.register_fake
def _(values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    return [x.new_empty(_resized(x, size, grows=1, shrinks=2)) for x in values]


@torch.library.custom_op("lltk::send_tokens", mutates_args=())
def send_tokens(values: Sequence[Tensor], size: int, group: str) -> Tensor:
    """Begin `tokens_to_heads`, for `receive_heads` to end; what runs between overlaps with it.

    Returns:
        [1], of no meaning: what `receive_heads` follows.
    """
    if left := _in_flight.pop(group, None):  # by a pass that an error ended
        left.wait()
    _in_flight[group] = _start(_blocks(values, size), size, group)
    return values[0].new_empty(1)


@send_tokens.register_fake
def _(values: Sequence[Tensor], size: int, group: str) -> Tensor:
    return values[0].new_empty(1)


@torch.library.custom_op("lltk::receive_heads", mutates_args=())
def receive_heads(sent: Tensor, values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    """End what `send_tokens` of the same values began."""
    return _heads(_in_flight.pop(group))


@receive_heads.register_fake
def _(sent: Tensor, values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    return [x.new_empty(_resized(x, size, grows=1, shrinks=2)) for x in values]


@torch.library.custom_op("lltk::heads_to_tokens", mutates_args=())
def heads_to_tokens(x: Tensor, size: int, group: str) -> Tensor:
    """See `reference.heads_to_tokens`: [B, L, h, …]."""
    (received,) = _start([x.unflatten(1, (size, -1)).movedim(1, 0)], size, group).wait()
    return received.movedim(0, 2).flatten(2, 3).contiguous()


@heads_to_tokens.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty(_resized(x, size, grows=2, shrinks=1))


@torch.library.custom_op("lltk::own_part", mutates_args=())
def own_part(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """This rank's part of what all ranks hold: the rank's ``1 / size`` along ``dim``."""
    return x.chunk(size, dim)[find_group(group, size).rank()].clone(
        memory_format=torch.contiguous_format
    )


@own_part.register_fake
def _(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    return x.new_empty(_resized(x, size, shrinks=dim))


@torch.library.custom_op("lltk::all_parts", mutates_args=())
def all_parts(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """All ranks' parts along ``dim``, in the order of ranks; undoes `own_part`."""
    (parts,) = _start([x.expand(size, *x.shape)], size, group).wait()
    return parts.movedim(0, dim).flatten(dim, dim + 1).contiguous()


@all_parts.register_fake
def _(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    return x.new_empty(_resized(x, size, grows=dim))


TOKENS_TO_HEADS = torch.ops.lltk.tokens_to_heads.default
SEND_TOKENS = torch.ops.lltk.send_tokens.default
RECEIVE_HEADS = torch.ops.lltk.receive_heads.default
HEADS_TO_TOKENS = torch.ops.lltk.heads_to_tokens.default
OWN_PART = torch.ops.lltk.own_part.default
ALL_PARTS = torch.ops.lltk.all_parts.default


@dataclass(frozen=True)
class _Exchange:
    """Exchanges that have begun.

    Attributes:
        received: what will hold the result; block r of [size, …] is from rank r.
        works: to be waited for.
    """

    received: list[Tensor]
    works: list[Any]

    def wait(self) -> list[Tensor]:
        """What was received."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise _lost(error) from error
        return self.received


_in_flight: dict[str, _Exchange] = {}
"""What `send_tokens` began, by group."""


def _start(values: Sequence[Tensor], size: int, group: str) -> _Exchange:
    """Give block r of each tensor, [size, …], to rank r."""
    ranks, started = find_group(group, size), _Exchange([], [])
    try:
        for x in values:
            sent = x.contiguous()
            received = torch.empty_like(sent)
            started.received.append(received)
            started.works.append(
                dist.all_to_all_single(_raw(received), _raw(sent), group=ranks, async_op=True)
            )
    except RuntimeError as error:
        raise _lost(error) from error
    return started


def _blocks(values: Sequence[Tensor], size: int) -> list[Tensor]:
    """[B, l, H, …] → [size, B, l, h, …], a block for each rank."""
    return [x.unflatten(2, (size, -1)).movedim(2, 0) for x in values]


def _heads(exchange: _Exchange) -> list[Tensor]:
    """[size, B, l, h, …] → [B, L, h, …]."""
    return [x.movedim(0, 1).flatten(1, 2).contiguous() for x in exchange.wait()]


def _raw(x: Tensor) -> Tensor:
    """Bytes, where a backend may not know the dtype."""
    return x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x


def _lost(error: RuntimeError) -> LostRank:
    reason = str(error).strip().splitlines()[0]
    return LostRank(f"ranks: an exchange failed, another rank has stopped ({reason}); start again")


def _resized(
    x: Tensor, size: int, grows: int | None = None, shrinks: int | None = None
) -> list[int]:
    """The shape, with a dimension ``size`` times as large and another divided by it."""
    sizes = list(x.shape)
    if grows is not None:
        sizes[grows] *= size
    if shrinks is not None:
        torch._check(sizes[shrinks] % size == 0)
        sizes[shrinks] //= size
    return sizes
