"""Norms whose only reader quantises them, as one op with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lltk.graph.edit import building, calls, module_of, prune, replace, shape
from lltk.graph.match import before_cast, is_of_rows, operands, read_once
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.fp8_quantise.op import OVERLOAD as FP8_QUANTISE
from lltk.ops.fp8_quantise_norm.op import OVERLOAD as FP8_QUANTISE_NORM
from lltk.ops.nvfp4_quantise.op import OVERLOAD as NVFP4_QUANTISE
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.nvfp4_quantise_norm.op import OVERLOAD as NVFP4_QUANTISE_NORM

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure."""


class FuseNormQuantise(Pass[Config]):
    """Norm, modulate and quantise activations in one op.

    ::

        fp8_quantise(layer_norm(x) · scale + shift)    →  fp8_quantise_norm(x, scale, shift)
        nvfp4_quantise(layer_norm(x) · scale + shift)  →  nvfp4_quantise_norm(x, scale, shift)

    Scale and shift are the norm's weight and bias, or of the frame that a token belongs to.
    """

    Config = Config
    reads = (Stage.QUANTISED,)
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in [*calls(graph, NVFP4_QUANTISE), *calls(graph, FP8_QUANTISE)]:
                found = _find(node.args[0])
                in_fp8 = node.target == FP8_QUANTISE
                if found is None or not (in_fp8 or shape(found.x)[-1] % BLOCK == 0):
                    report.miss(node, "quantises no norm that it alone reads")
                    continue
                target = FP8_QUANTISE_NORM if in_fp8 else NVFP4_QUANTISE_NORM
                rule = () if in_fp8 else (node.args[2] if len(node.args) > 2 else "none",)
                with building(node, module_of(found.norm)) as build:
                    made = build(target, found.x, found.scale, found.shift, found.eps, *rule)
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
        value = operands(value, aten.to.dtype)[0]
    norm: Any = value
    scale: Any = None
    shift: Any = None
    if modulated := read_once(value, aten.flatten.using_ints):
        product, shift = operands(value.args[0], aten.add.Tensor)
        norm, scale = operands(product, aten.mul.Tensor)
        norm = operands(norm, aten.unflatten.int)[0]
    if not read_once(norm, aten.layer_norm.default):
        return None
    x, size, weight, bias, eps = norm.args[:5]
    if not modulated:
        scale, shift = weight, bias
    elif weight is not None or bias is not None:
        return None
    if dtype != torch.float32:
        x = before_cast(x)
    fits = x.meta["val"].dtype == dtype and list(size) == [shape(x)[-1]]
    if fits and is_of_rows(scale, x) and is_of_rows(shift, x):
        return _Norm(norm, x, scale, shift, eps, modulated)
    return None
