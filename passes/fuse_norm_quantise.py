"""Norms whose only reader quantises them, as one op with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lltk.graph.edit import building, calls, module_of, prune, replace, shape
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.nvfp4_quantise.op import OVERLOAD as QUANTISE
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.nvfp4_quantise_norm.op import OVERLOAD as QUANTISE_NORM

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure."""


class FuseNormQuantise(Pass[Config]):
    """Norm, modulate and quantise activations in one op.

    ::

        nvfp4_quantise(layer_norm(x) · scale + shift)  →  nvfp4_quantise_norm(x, scale, shift)

    Scale and shift are the norm's weight and bias, or of the frame that a token belongs to.
    """

    Config = Config
    reads = (Stage.QUANTISED,)
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, QUANTISE):
                found = _find(node.args[0])
                if found is None:
                    report.miss(node, "quantises no norm that it alone reads")
                    continue
                rule = node.args[2] if len(node.args) > 2 else "none"
                with building(node, module_of(found.norm)) as build:
                    made = build(QUANTISE_NORM, found.x, found.scale, found.shift, found.eps, rule)
                replace(node, made)
                report.match("modulated norms" if found.modulated else "norms")
            prune(graph)


@dataclass(frozen=True)
class _Norm:
    norm: fx.Node
    x: fx.Node
    scale: fx.Node
    shift: fx.Node
    eps: float
    modulated: bool


def _find(value: Any) -> _Norm | None:
    """The norm that makes a value, computed in float32, if nothing else reads what is between."""
    dtype = value.meta["val"].dtype
    if dtype != torch.float32:
        value = _operands(value, aten.to.dtype)[0]
    norm: Any = value
    scale: Any = None
    shift: Any = None
    if modulated := _is_call(value, aten.flatten.using_ints):
        product, shift = _operands(value.args[0], aten.add.Tensor)
        norm, scale = _operands(product, aten.mul.Tensor)
        norm = _operands(norm, aten.unflatten.int)[0]
    if not _is_call(norm, aten.layer_norm.default):
        return None
    x, size, weight, bias, eps = norm.args[:5]
    if not modulated:
        scale, shift = weight, bias
    elif weight is not None or bias is not None:
        return None
    if dtype != torch.float32:
        x = x.args[0]
    fits = x.meta["val"].dtype == dtype and list(size) == [shape(x)[-1]] and not size[0] % BLOCK
    if fits and _is_of_rows(scale, x) and _is_of_rows(shift, x):
        return _Norm(norm, x, scale, shift, eps, modulated)
    return None


def _is_of_rows(scale: Any, x: fx.Node) -> bool:
    """Whether a scale is float32 [D], or [B, F, 1, D] for the frames of tokens [B, F · T, D]."""
    if not isinstance(scale, fx.Node) or scale.meta["val"].dtype != torch.float32:
        return False
    (batch, *_, width), sizes = shape(x), shape(scale)
    return sizes == (width,) or (len(sizes) == 4 and (sizes[0], *sizes[2:]) == (batch, 1, width))


def _is_call(node: Any, target: Any) -> bool:
    """Whether it is a call that is read once."""
    return isinstance(node, fx.Node) and node.target == target and len(node.users) == 1


def _operands(node: Any, target: Any) -> tuple[Any, Any]:
    """The first two of a call that is read once, or None."""
    if not _is_call(node, target):
        return None, None
    return node.args[0], node.args[1]
