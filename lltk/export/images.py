"""Convolutions, and what surrounds them in a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lltk.export.emitter import Emitter, emits, like, source

aten = torch.ops.aten


@emits(aten.conv2d.default, aten.conv3d.default)
def _conv(
    to: Emitter,
    node: fx.Node,
    x: str,
    weight: str,
    bias: str | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> str:
    axes = source(node).dim() - 2
    strides, pads, dilations = (
        list(each) * (axes // len(each)) for each in (stride, padding, dilation)
    )
    return to.op(
        "Conv", x, weight, bias or "",
        strides=strides, pads=pads * 2, dilations=dilations, group=groups,
    )  # fmt: skip


@emits(aten.pad.default)
def _pad(
    to: Emitter,
    node: fx.Node,
    x: str,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> str:
    made = like(node)
    before, after = [0] * made.dim(), [0] * made.dim()
    for index in range(len(pad) // 2):  # from the last axis on
        before[-1 - index], after[-1 - index] = pad[2 * index : 2 * index + 2]
    filling = to.constant(value or 0, made.dtype)
    return to.op("Pad", x, to.ints(*before, *after), filling, mode=mode)


@emits(aten._upsample_nearest_exact2d.vec)
def _upsample(
    to: Emitter, node: fx.Node, x: str, size: Sequence[int] | None, scales: Sequence[float] | None
) -> str:
    pairs = zip(like(node).shape, source(node).shape, strict=True)
    factors = [made // given for made, given in pairs]
    assert [g * f for g, f in zip(source(node).shape, factors, strict=True)] == list(
        like(node).shape
    ), f"{node.name} is no upsampling by whole numbers"
    return to.op(
        "Resize", x, "", to.constant(factors, torch.float32),
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
