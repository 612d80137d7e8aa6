"""Gated residuals as one op, with the norm that quantises the sum where one follows."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lltk.graph.edit import (
    building,
    calls,
    module_of,
    prune,
    replace,
    shape,
    sort_topologically,
)
from lltk.graph.match import before_cast, is_of_rows, operands, sole_reader
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.fp8_quantise_add_norm.op import OVERLOAD as ADD_NORM
from lltk.ops.fp8_quantise_norm.op import OVERLOAD as NORM
from lltk.ops.gated_add.op import OVERLOAD as GATED_ADD

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure."""


class FuseGatedResidual(Pass[Config]):
    """Add a residual in one op, which norms and quantises the sum where fp8_quantise_norm reads it.

    ::

        x + gate · y                         →  gated_add(x, y, gate)
        s = x + gate · y; fp8_quantise_norm(s, …)  →  s, … = fp8_quantise_add_norm(x, y, gate, …)

    The gate is of the frame that a token belongs to. A sum without one is taken where a norm
    follows in its block: the next block's is compiled apart. So this comes after
    fuse_norm_quantise, if that is in the recipe.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    kinds = ("stream", "score", "reference")
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, aten.add.Tensor):
                found = _gated(node) or _plain(node)
                norm = None if found is None else _norm_of(program, found.total)
                if found is None or (norm is None and found.gate is None):
                    report.miss(node, "adds no gated residual, nor one that is normed in FP8")
                    continue
                _fuse(found, norm)
                kind = "sums" if found.gate is None else "gated sums"
                report.match(kind if norm is None else f"{kind} and norms")
            sort_topologically(graph)
            prune(graph)


@dataclass(frozen=True)
class _Sum:
    total: fx.Node
    x: fx.Node
    y: fx.Node
    gate: fx.Node | None


def _fuse(found: _Sum, norm: fx.Node | None) -> None:
    with building(found.total, module_of(found.total)) as build:
        if norm is None:
            made = total = build(GATED_ADD, found.x, found.y, found.gate)
        else:
            made = build(ADD_NORM, found.x, found.y, found.gate, *norm.args[1:])
            total = build(operator.getitem, made, 0)
    replace(found.total, total)
    if norm is not None:
        for user in list(norm.users):
            index: Any = user.args[1]
            user.args = (made, index + 1)
        norm.graph.erase_node(norm)


def _gated(node: fx.Node) -> _Sum | None:
    """A sum in float32 with frames scaled by their gate, rounded after it."""
    total = node
    x: Any = node.args[0]
    frames, gate = operands(operands(node.args[1], aten.flatten.using_ints)[0], aten.mul.Tensor)
    y = operands(frames, aten.unflatten.int)[0]
    if y is None or node.kwargs:
        return None
    if (cast := sole_reader(node, aten.to.dtype)) is not None:
        total, x, y = cast, before_cast(x), before_cast(y)
    return _Sum(total, x, y, gate) if _fits(total, x, y) and is_of_rows(gate, x) else None


def _plain(node: fx.Node) -> _Sum | None:
    x: Any = node.args[0]
    y: Any = node.args[1]
    return _Sum(node, x, y, None) if _fits(node, x, y) and not node.kwargs else None


def _fits(total: fx.Node, x: Any, y: Any) -> bool:
    """Whether all are of one shape and dtype."""
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return False
    return all(
        shape(v) == shape(total) and v.meta["val"].dtype == total.meta["val"].dtype for v in (x, y)
    )


def _norm_of(program: Program, total: fx.Node) -> fx.Node | None:
    """The one that quantises the norm of a sum, in the same block."""
    layer = program.spec.layer_of(module_of(total))
    for user in total.users:
        if user.target == NORM and program.spec.layer_of(module_of(user)) == layer:
            return user
    return None
