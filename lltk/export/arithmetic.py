"""Arithmetic of single elements, and casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lltk.export.emitter import TYPES, Emitter, emits, like, source

aten = torch.ops.aten
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}


def _binary(kind: str) -> None:
    @emits(getattr(aten, kind).Tensor, getattr(aten, kind).Scalar)
    def rule(to: Emitter, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> str:
        assert alpha == 1, f"{node.name} has alpha {alpha}"
        dtype = like(node).dtype

        def operand(index: int, value: Any) -> str:
            given = node.args[index]
            if isinstance(given, fx.Node) and like(given).dtype != dtype:
                return to.op("Cast", value, to=TYPES[dtype])
            return to.tensor(value, dtype)

        return to.op(_BINARY[kind], operand(0, a), operand(1, b))


for _kind in _BINARY:
    _binary(_kind)


def _unary(kind: str) -> None:
    @emits(getattr(aten, kind.lower()).default)
    def rule(to: Emitter, node: fx.Node, x: str) -> str:
        return to.op(kind, x)


for _kind in ("Sin", "Cos", "Tanh"):
    _unary(_kind)


@emits(aten.rsqrt.default)
def _rsqrt(to: Emitter, node: fx.Node, x: str) -> str:
    return to.op("Div", to.constant(1, like(node).dtype), to.op("Sqrt", x))


@emits(aten.pow.Tensor_Scalar)
def _pow(to: Emitter, node: fx.Node, x: str, exponent: float) -> str:
    return to.op("Pow", x, to.constant(exponent, like(node).dtype))


@emits(aten.mean.dim)
def _mean(to: Emitter, node: fx.Node, x: str, axes: Sequence[int], keep: bool = False) -> str:
    return to.op("ReduceMean", x, to.ints(*axes), keepdims=int(keep))


@emits(aten.where.ScalarOther)
def _where(to: Emitter, node: fx.Node, condition: str, x: str, other: float) -> str:
    return to.op("Where", condition, x, to.constant(other, like(node).dtype))


@emits(aten.silu.default)
def _silu(to: Emitter, node: fx.Node, x: str) -> str:
    return to.op("Mul", x, to.op("Sigmoid", x))


@emits(aten.gelu.default)
def _gelu(to: Emitter, node: fx.Node, x: str, approximate: str = "none") -> str:
    return to.op("Gelu", x, approximate=approximate)


@emits(aten.clamp.default)
def _clamp(
    to: Emitter, node: fx.Node, x: str, least: float | None = None, most: float | None = None
) -> str:
    dtype = like(node).dtype
    bounds = ("" if bound is None else to.constant(bound, dtype) for bound in (least, most))
    return to.op("Clip", x, *bounds)


@emits(aten.clamp_min.default)
def _clamp_min(to: Emitter, node: fx.Node, x: str, least: float) -> str:
    return to.op("Clip", x, to.constant(least, like(node).dtype))


@emits(aten.to.dtype)
def _to(to: Emitter, node: fx.Node, x: str, dtype: torch.dtype, *_: object) -> str:
    return x if source(node).dtype == dtype else to.op("Cast", x, to=TYPES[dtype])


@emits(aten.new_zeros.default, aten.zeros_like.default)
def _zeros(to: Emitter, node: fx.Node, *_: object, **__: object) -> str:
    made = like(node)
    return to.op("Expand", to.constant(0, made.dtype), to.ints(*made.shape))
