"""``lltk::`` ops that move a chunk between ranks; no gradient flows through them.

``group`` is a name that is resolved when an op runs (`lltk.parallel.groups`) and ``size`` the
number of its ranks, so that shapes are known without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lltk.parallel.groups import find_group


class LostRank(ValueError):
    """An exchange failed because another rank has stopped, or its link has."""


@torch.library.custom_op("lltk::tokens_to_heads", mutates_args=())
def tokens_to_heads(values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    """See `reference.tokens_to_heads`, for several tensors at once: [B, l, H, …] each."""
    blocks = [x.unflatten(2, (size, -1)).movedim(2, 0) for x in values]
    return [x.movedim(0, 1).flatten(1, 2).contiguous() for x in _swap(blocks, size, group)]


@tokens_to_heads.register_fake
def _(values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    return [x.new_empty(_resized(x, size, grows=1, shrinks=2)) for x in values]


@torch.library.custom_op("lltk::heads_to_tokens", mutates_args=())
def heads_to_tokens(x: Tensor, size: int, group: str) -> Tensor:
    """See `reference.heads_to_tokens`: [B, L, h, …]."""
    (received,) = _swap([x.unflatten(1, (size, -1)).movedim(1, 0)], size, group)
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
    (parts,) = _swap([x.expand(size, *x.shape)], size, group)
    return parts.movedim(0, dim).flatten(dim, dim + 1).contiguous()


@all_parts.register_fake
def _(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    return x.new_empty(_resized(x, size, grows=dim))


TOKENS_TO_HEADS = torch.ops.lltk.tokens_to_heads.default
HEADS_TO_TOKENS = torch.ops.lltk.heads_to_tokens.default
OWN_PART = torch.ops.lltk.own_part.default
ALL_PARTS = torch.ops.lltk.all_parts.default


def _swap(values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    """Give block r of each tensor, [size, …], to rank r; block r of a result is from rank r."""
    ranks = find_group(group, size)
    received, started = [], []
    try:
        for x in values:
            sent = x.contiguous()
            received.append(torch.empty_like(sent))
            raw = _raw(received[-1]), _raw(sent)
            started.append(dist.all_to_all_single(*raw, group=ranks, async_op=True))
        for work in started:
            work.wait()
    except RuntimeError as error:
        raise _lost(error) from error
    return received


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
