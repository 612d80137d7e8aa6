"""Ops that do several things to a row at once, and FP8."""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import fx

from lltk.export.emitter import Emitter, emits, like, source
from lltk.export.nvfp4 import quantised_rows
from lltk.ops.floats import E4M3_MAX
from lltk.ops.implementations import overload

_FLOAT = torch.float32
_FLT_MAX = torch.finfo(torch.float32).max


@emits(overload("row_pipeline"))
def _row_pipeline(
    emitter: Emitter,
    node: fx.Node,
    x: str,
    y: str | None = None,
    gate: str | None = None,
    scale: str | None = None,
    shift: str | None = None,
    eps: float | None = None,
    activation: str | None = None,
    to: str = "plain",
    rule: str = "none",
    keep_sum: bool = False,
) -> list[str]:
    shape = source(node).shape

    def changed(kind: str, rows: str, by: str, name: str) -> str:
        """Rows of x's shape and a row for each group of them; ``name`` is the latter's argument."""
        of_groups = source(node, name)
        groups = of_groups.numel() // shape[-1]
        apart = emitter.op("Reshape", rows, emitter.ints(groups, -1, shape[-1]))
        each = emitter.op("Reshape", by, emitter.ints(groups, 1, shape[-1]))
        return emitter.op("Reshape", emitter.op(kind, apart, each), emitter.ints(*shape))

    if y is not None:
        x = emitter.op("Add", x, y if gate is None else changed("Mul", y, gate, "gate"))
    total = x
    if scale is not None:
        ones = emitter.constant([1.0] * shape[-1], _FLOAT)
        norm = "RMSNormalization" if shift is None else "LayerNormalization"
        x = changed("Mul", emitter.op(norm, x, ones, axis=-1, epsilon=eps), scale, "scale")
        x = x if shift is None else changed("Add", x, shift, "shift")
    if activation == "gelu":
        x = emitter.op("Gelu", x, approximate="tanh")
    written = [x]
    if to == "fp8":
        written = _fp8(emitter, x)
    elif to == "e4m3":
        written = [emitter.op("Cast", x, to=TensorProto.FLOAT8E4M3FN)]
    elif to == "nvfp4":
        written = quantised_rows(emitter, x, shape, rule)
    return [*written, total] if keep_sum else written


def _fp8(to: Emitter, x: str) -> list[str]:
    """Rows in FP8 and their scales, step by step as `fp8_quantise`."""
    peak = to.op("ReduceMax", to.op("Abs", x), to.ints(-1), keepdims=1)
    scales = to.op("Div", peak, to.constant(E4M3_MAX, _FLOAT))
    zero = to.op("Equal", scales, to.constant(0, _FLOAT))
    scales = to.op("Where", zero, to.constant(1, _FLOAT), scales)
    inverse = to.op("Div", to.constant(1, _FLOAT), scales)
    inverse = to.op("Min", inverse, to.constant(_FLT_MAX, _FLOAT))
    return [to.op("Cast", to.op("Mul", x, inverse), to=TensorProto.FLOAT8E4M3FN), scales]


@emits(overload("fp8_matmul"))
def _fp8_matmul(
    to: Emitter,
    node: fx.Node,
    a: str,
    a_scales: str,
    b: str,
    b_scales: str,
    bias: str | None,
    dtype: torch.dtype,
) -> str:
    wide = (to.op("Cast", each, to=TensorProto.FLOAT) for each in (a, b))
    left, right = wide
    made = to.op("MatMul", left, to.op("Transpose", right, perm=[1, 0]))
    made = to.op("Mul", to.op("Mul", made, a_scales), to.op("Reshape", b_scales, to.ints(-1)))
    return made if bias is None else to.op("Add", made, bias)


@emits(overload("rms_norm_rope"))
def _rms_norm_rope(
    to: Emitter, node: fx.Node, x: str, weight: str, cos: str, sin: str, eps: float
) -> str:
    batch, length, heads, width = like(node).shape
    normed = to.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)
    pairs = to.op("Reshape", normed, to.ints(batch, length, heads, width // 2, 2))
    even, odd = (_at(to, pairs, index) for index in (0, 1))
    length = source(node, "cos").shape[1]
    tables = (to.op("Reshape", t, to.ints(1, length, 1, width // 2, 2)) for t in (cos, sin))
    c, s = (_at(to, table, index) for index, table in enumerate(tables))
    turned = (
        to.op("Sub", to.op("Mul", even, c), to.op("Mul", odd, s)),
        to.op("Add", to.op("Mul", even, s), to.op("Mul", odd, c)),
    )
    apart = (to.op("Unsqueeze", part, to.ints(-1)) for part in turned)
    return to.op("Reshape", to.op("Concat", *apart, axis=-1), to.ints(*like(node).shape))


def _at(to: Emitter, x: str, index: int) -> str:
    """An element of the last axis."""
    return to.op("Gather", x, to.constant(index, torch.int64), axis=-1)
