"""Convolutions, and what surrounds them in a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lltk.export.emitter import Dialect, Emitter, emits, like, source

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
    alike = strides[0] == dilations[0] == groups == 1 and pads[0] == 0
    kernel = source(node, 1).shape[2:]
    by_frames = to.dialect is Dialect.ORT and axes == 3
    spared = _spared(node) if axes == 3 and alike else 0
    if by_frames and alike and len(source(node)) == 1 and kernel[1:] != (1, 1):
        return _conv_by_frames(to, node, x, weight, bias, strides, pads, dilations, spared)
    if spared:
        x, weight = (
            to.op("Slice", each, to.ints(spared), to.ints(end), to.ints(2))
            for each, end in ((x, source(node).shape[2]), (weight, kernel[0]))
        )
    return to.op(
        "Conv", x, weight, bias or "",
        strides=strides, pads=pads * 2, dilations=dilations, group=groups,
    )  # fmt: skip


def _conv_by_frames(
    to: Emitter,
    node: fx.Node,
    x: str,
    weight: str,
    bias: str | None,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    spared: int,
) -> str:
    """A convolution of a video as a sum of convolutions of its frames, one a frame of the kernel.

    On a CPU ONNX Runtime has fast kernels for images alone.
    """
    frames = to.op("Transpose", to.op("Squeeze", x, to.ints(0)), perm=[1, 0, 2, 3])
    made, count = "", like(node).shape[2]
    for index in range(spared, source(node, 1).shape[2]):
        own = to.op("Slice", frames, to.ints(index), to.ints(index + count), to.ints(0))
        kernel = to.op("Gather", weight, to.constant(index, torch.int64), axis=2)
        each = to.op(
            "Conv", own, kernel, "" if made else bias or "",
            strides=strides[1:], pads=[*pads[1:]] * 2, dilations=dilations[1:],
        )  # fmt: skip
        made = to.op("Add", made, each) if made else each
    return to.op("Unsqueeze", to.op("Transpose", made, perm=[1, 0, 2, 3]), to.ints(0))


def _spared(node: fx.Node) -> int:
    """How many of a kernel's first frames meet zeros alone, which were put before a video.

    Of a video's first latent that is all but the kernel's last frame: what leaves them out does a
    third of the work, and an engine of it holds a third of the weight.
    """
    video = node.args[0]
    assert isinstance(video, fx.Node)
    if video.target is not aten.pad.default or len(video.args) != 2 or video.kwargs:
        return 0
    put: Any = video.args[1]  # before and after each axis, from the last on
    before: int = put[4] if len(put) > 4 else 0
    return max(0, before - like(node).shape[2] + 1)


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
