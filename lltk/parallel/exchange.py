"""``lltk::`` ops that move a chunk between ranks. Each names its inverse, which moves gradients.

``group`` is the name of a process group, which is looked up when an op runs
(`lltk.parallel.groups`). ``size`` is the number of its ranks, so that shapes follow without it.

What a rank has sent is known by the tensor that it will arrive in, not by the group. So exchanges
of several sessions may be under way at once and do not meet. All ranks must begin them in the same
order.

What an op moves to other ranks, its backward moves back. What all ranks hold, such as the input of
`own_part`, has a gradient that all hold too: every rank computes the same loss of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives  # defines torch.ops._c10d_functional
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from lltk.parallel.alike import Alike
from lltk.parallel.groups import find_group, lost

_ALIGNED = 16
"""Bytes; where a value begins in a message is a multiple, so that kernels read whole vectors."""
_TO_HEADS, _TO_TOKENS = (2, 1), (1, 2)
"""The axis that an exchange divides among ranks, and the one that it joins."""


@torch.library.custom_op("lltk::tokens_to_heads", mutates_args=())
def tokens_to_heads(values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    """See `reference.tokens_to_heads`, for several tensors at once: [B, l, H, …] each."""
    return _exchanged(values, _TO_HEADS, size, group)


@tokens_to_heads.register_fake
def _(values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    return _new_exchanged(values, _TO_HEADS, size)


@torch.library.custom_op("lltk::send_tokens", mutates_args=())
def send_tokens(values: Sequence[Tensor], size: int, group: str) -> Tensor:
    """Begin `tokens_to_heads`, for `receive_heads` to end; what runs between overlaps with it.

    Returns:
        uint8 [size, n]: where the other ranks' parts arrive. Its bytes are undefined before
        `receive_heads` has returned.
    """
    return _begin(_packed(values, _TO_HEADS, size), size, group)


@send_tokens.register_fake
def _(values: Sequence[Tensor], size: int, group: str) -> Tensor:
    return values[0].new_empty(size, _row_bytes(values, size), dtype=torch.uint8)


@torch.library.custom_op("lltk::receive_heads", mutates_args=())
def receive_heads(sent: Tensor, values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    """Wait for what `send_tokens` of the same values began; gives what `tokens_to_heads` does."""
    return _joined(_end(sent), values, _TO_HEADS, size)


@receive_heads.register_fake
def _(sent: Tensor, values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    return _new_exchanged(values, _TO_HEADS, size)


@torch.library.custom_op("lltk::heads_to_tokens", mutates_args=())
def heads_to_tokens(values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    """See `reference.heads_to_tokens`, for several tensors at once: [B, L, h, …] each."""
    return _exchanged(values, _TO_TOKENS, size, group)


@heads_to_tokens.register_fake
def _(values: Sequence[Tensor], size: int, group: str) -> list[Tensor]:
    return _new_exchanged(values, _TO_TOKENS, size)


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
    # As bytes, since a backend may not know the dtype.
    sent = x.expand(size, *x.shape).contiguous().view(torch.uint8)
    parts = _end(_begin(sent, size, group)).view(x.dtype)
    return parts.movedim(0, dim).flatten(dim, dim + 1).contiguous()


@all_parts.register_fake
def _(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    return x.new_empty(_resized(x, size, grows=dim))


@torch.library.custom_op("lltk::all_max", mutates_args=())
def all_max(x: Tensor, size: int, group: str) -> Tensor:
    """The largest of all ranks' elements at each place, NaN where one is; no gradient."""
    sent = x.expand(size, *x.shape).contiguous()
    return _end(_begin(sent, size, group)).amax(0)


@all_max.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lltk::own_seed", mutates_args=())
def own_seed(seed: Tensor, size: int, group: str) -> Tensor:
    """A seed, int64 [2], with this rank's number and the number of ranks behind it."""
    rank = find_group(group, size).rank()
    return torch.cat([seed, seed.new_full((1,), rank), seed.new_full((1,), size)])


@own_seed.register_fake
def _(seed: Tensor, size: int, group: str) -> Tensor:
    return seed.new_empty(len(seed) + 2)


def _invert(op: CustomOpDef, inverse: Callable[..., Any], gradient: int = 0) -> None:
    """Let an op's gradient be what another op makes of the results' gradient.

    Args:
        op: the op, with the same arguments behind its values as the other op.
        inverse: the other op.
        gradient: the argument of the op that is its values.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rest = inputs[gradient + 1 :]

    def backward(ctx: Any, grads: Any) -> tuple[Any, ...]:
        nothing = [None] * len(ctx.rest)
        return (*[None] * gradient, inverse(grads, *ctx.rest), *nothing)

    op.register_autograd(backward, setup_context=keep)


_invert(tokens_to_heads, heads_to_tokens)
_invert(heads_to_tokens, tokens_to_heads)
_invert(receive_heads, heads_to_tokens, gradient=1)
_invert(own_part, all_parts)
_invert(all_parts, own_part)

TOKENS_TO_HEADS = torch.ops.lltk.tokens_to_heads.default
SEND_TOKENS = torch.ops.lltk.send_tokens.default
RECEIVE_HEADS = torch.ops.lltk.receive_heads.default
HEADS_TO_TOKENS = torch.ops.lltk.heads_to_tokens.default
OWN_PART = torch.ops.lltk.own_part.default
ALL_PARTS = torch.ops.lltk.all_parts.default
ALL_MAX = torch.ops.lltk.all_max.default
OWN_SEED = torch.ops.lltk.own_seed.default


def _begin(sent: Tensor, size: int, group: str) -> Tensor:
    """Send row r of uint8 [size, …] to rank r; gives where the rows of all ranks will arrive.

    torch knows an exchange by the memory of its result, which `_end` waits for.
    """
    found, each = find_group(group, size), [1] * size
    if isinstance(found, Alike):
        return found.swapped(sent)
    try:
        received: Tensor = torch.ops._c10d_functional.all_to_all_single(
            sent, each, each, found.group_name
        )
    except RuntimeError as error:
        raise lost(error) from error
    return received


def _end(received: Tensor) -> Tensor:
    """Wait until the rows of all ranks have arrived."""
    try:
        arrived: Tensor = torch.ops._c10d_functional.wait_tensor(received)
    except RuntimeError as error:
        raise lost(error) from error
    return arrived


def _exchanged(
    values: Sequence[Tensor], axes: tuple[int, int], size: int, group: str
) -> list[Tensor]:
    """Divide one axis of each value among the ranks, and join what they send along another."""
    return _joined(_end(_begin(_packed(values, axes, size), size, group)), values, axes, size)


def _new_exchanged(values: Sequence[Tensor], axes: tuple[int, int], size: int) -> list[Tensor]:
    divided, joined = axes
    return [x.new_empty(_resized(x, size, grows=joined, shrinks=divided)) for x in values]


def _packed(values: Sequence[Tensor], axes: tuple[int, int], size: int) -> Tensor:
    """All values' bytes, uint8 [size, n]: row r holds the parts that are rank r's."""
    divided, _ = axes
    parts = [x.unflatten(divided, (size, -1)).movedim(divided, 0) for x in values]
    if len(parts) == 1:  # it may lie in rows already
        return parts[0].contiguous().view(size, -1).view(torch.uint8)
    packed = values[0].new_empty(size, _row_bytes(values, size), dtype=torch.uint8)
    for part, block in zip(parts, _blocks(packed, values, axes, size), strict=True):
        block.copy_(part)
    return packed


def _joined(
    received: Tensor, values: Sequence[Tensor], axes: tuple[int, int], size: int
) -> list[Tensor]:
    """What the ranks packed, side by side; none shares memory with another."""
    _, joined = axes
    blocks = _blocks(received, values, axes, size)
    return [torch.cat(block.unbind(0), dim=joined) for block in blocks]


def _row_bytes(values: Sequence[Tensor], size: int) -> int:
    """Bytes of a rank's parts. Those of several values are each rounded up to `_ALIGNED`."""
    counts = [x.nbytes // size for x in values]
    return counts[0] if len(counts) == 1 else sum(map(_aligned, counts))


def _blocks(
    packed: Tensor, values: Sequence[Tensor], axes: tuple[int, int], size: int
) -> Iterator[Tensor]:
    """Views into uint8 [size, n] of where each value's parts lie: [size, …] each."""
    divided, _ = axes
    begin = 0
    for x in values:
        count = x.nbytes // size
        part = packed[:, begin : begin + count].view(x.dtype)
        yield part.view(size, *_resized(x, size, shrinks=divided))
        begin += _aligned(count)


def _aligned(count: int) -> int:
    """A number of bytes, rounded up to a multiple of `_ALIGNED`."""
    return -(-count // _ALIGNED) * _ALIGNED


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
