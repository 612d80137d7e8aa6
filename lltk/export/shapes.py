"""What moves elements and computes none: views, transposes, slices, joins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lltk.export.emitter import Emitter, emits, like, source

aten = torch.ops.aten
_END = 2**63 - 1


@emits(
    aten.flatten.using_ints, aten.reshape.default, aten.squeeze.dim, aten.unflatten.int,
    aten.unsqueeze.default, aten.view.default,
)  # fmt: skip
def _reshape(to: Emitter, node: fx.Node, x: str, *_: object) -> str:
    return to.op("Reshape", x, to.ints(*like(node).shape))


@emits(aten.clone.default, aten.contiguous.default)
def _same(to: Emitter, node: fx.Node, x: str, **_: object) -> str:
    return x


@emits(aten.expand.default, aten.expand_as.default)
def _expand(to: Emitter, node: fx.Node, x: str, *_: object) -> str:
    return to.op("Expand", x, to.ints(*like(node).shape))


@emits(aten.permute.default)
def _permute(to: Emitter, node: fx.Node, x: str, order: Sequence[int]) -> str:
    return to.op("Transpose", x, perm=[axis % len(order) for axis in order])


@emits(aten.transpose.int)
def _transpose(to: Emitter, node: fx.Node, x: str, one: int, other: int) -> str:
    order = list(range(source(node).dim()))
    order[one], order[other] = order[other], order[one]
    return to.op("Transpose", x, perm=order)


@emits(aten.slice.Tensor)
def _slice(
    to: Emitter,
    node: fx.Node,
    x: str,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> str:
    stop = _END if end is None else end
    return to.op("Slice", x, to.ints(start or 0), to.ints(stop), to.ints(axis), to.ints(step))


@emits(aten.select.int)
def _select(to: Emitter, node: fx.Node, x: str, axis: int, index: int) -> str:
    return to.op("Gather", x, to.constant(index, torch.int64), axis=axis)


@emits(aten.unbind.int)
def _unbind(to: Emitter, node: fx.Node, x: str, axis: int = 0) -> list[str]:
    numbers = range(source(node).shape[axis])
    return [to.op("Gather", x, to.constant(i, torch.int64), axis=axis) for i in numbers]


@emits(aten.chunk.default)
def _chunk(to: Emitter, node: fx.Node, x: str, count: int, axis: int = 0) -> list[str]:
    sizes = [part.shape[axis] for part in node.meta["val"]]
    return to.ops("Split", len(sizes), x, to.ints(*sizes), axis=axis)


@emits(aten.cat.default)
def _cat(to: Emitter, node: fx.Node, parts: Sequence[str], axis: int = 0) -> str:
    return to.op("Concat", *parts, axis=axis)


@emits(aten.stack.default)
def _stack(to: Emitter, node: fx.Node, parts: Sequence[str], axis: int = 0) -> str:
    place = to.ints(axis)
    return to.op("Concat", *(to.op("Unsqueeze", part, place) for part in parts), axis=axis)


@emits(aten.repeat_interleave.self_int)
def _repeat(to: Emitter, node: fx.Node, x: str, count: int, axis: int) -> str:
    sizes = list(source(node).shape)
    after = axis % len(sizes) + 1
    apart = to.op("Unsqueeze", x, to.ints(after))
    copies = to.op("Expand", apart, to.ints(*sizes[:after], count, *sizes[after:]))
    return to.op("Reshape", copies, to.ints(*like(node).shape))
