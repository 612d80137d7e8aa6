"""The norm and the rotation of queries and keys, as one op."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lltk.graph.edit import building, calls, module_of, prune, replace, shape
from lltk.graph.match import is_call, sole_reader
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

aten = torch.ops.aten
NORM_ROPE = overload("rms_norm_rope")


class Config(PassConfig):
    """Nothing to configure."""


class FuseNormRope(Pass[Config]):
    """Do the RMS norm over all heads and the rotation by positions in one op.

    ::

        rotate(heads(rms_norm(x, weight)), cos, sin)  →  rms_norm_rope(x, weight, cos, sin)
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    kinds = ("stream", "score", "reference")
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, aten.stack.default):
                found = _find(node)
                if found is None:
                    report.miss(node, "does not rotate a norm's result by a table of tokens")
                    continue
                x, _, weight, eps = found.norm.args
                with building(found.turned, module_of(found.norm)) as build:
                    made = build(NORM_ROPE, x, weight, found.cos, found.sin, eps)
                replace(found.turned, made)
                report.match("norms and rotations")
            prune(graph)


@dataclass(frozen=True)
class _Rotation:
    norm: fx.Node
    cos: fx.Node
    sin: fx.Node
    turned: fx.Node


def _find(stack: fx.Node) -> _Rotation | None:
    """The rotation whose result a stack [a cos − b sin, a sin + b cos] is; or None."""
    parts: Any = stack.args[0]
    if len(parts) != 2 or stack.args[1:] != (-1,) or not is_call(parts[0], aten.sub.Tensor):
        return None
    products = [product for part in parts for product in part.args[:2]]
    if not is_call(parts[1], aten.add.Tensor) or not _all_calls(products, aten.mul.Tensor):
        return None
    (even, cos), (odd, sin), *others = (product.args for product in products)
    norm = _norm(even, odd)
    if others != [(even, sin), (odd, cos)] or norm is None:
        return None
    tables = _table(cos, 0), _table(sin, 1)
    turned = _rounded(stack, norm.meta["val"].dtype)
    if turned is None or any(table is None for table in tables):
        return None
    batch, *_, width = shape(tables[0])
    fits = batch == 1 and shape(turned)[2:] == (shape(norm)[-1] // width, width)
    return _Rotation(norm, *tables, turned) if fits else None


def _all_calls(nodes: list[Any], target: Any) -> bool:
    return all(is_call(node, target) for node in nodes)


def _norm(even: Any, odd: Any) -> Any:
    """The norm over all heads, with a weight, that gives these pairs of channels; or None."""
    if not _all_calls([even, odd], operator.getitem) or (even.args[1], odd.args[1]) != (0, 1):
        return None
    pairs = even.args[0]
    if pairs is not odd.args[0] or not is_call(pairs, aten.unbind.int) or pairs.args[1] != -1:
        return None
    pairs = pairs.args[0]
    if not is_call(pairs, aten.unflatten.int) or pairs.args[1:] != (-1, [-1, 2]):
        return None
    heads = pairs.args[0]
    if not is_call(heads, aten.unflatten.int) or heads.args[1] != 2:
        return None
    norm = heads.args[0]
    if not is_call(norm, aten.rms_norm.default) or norm.args[1:2] != ([shape(norm)[-1]],):
        return None
    return norm if len(norm.args) == 4 and norm.args[2] is not None else None


def _table(part: Any, first: int) -> Any:
    """The table that a part is every second channel of, from ``first`` on; None for other parts."""
    if not is_call(part, aten.slice.Tensor) or part.args[1:] != (3, first, sys.maxsize, 2):
        return None
    return part.args[0]


def _rounded(stack: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """The node that joins the pairs to channels and has a dtype; None if there is none."""
    node: fx.Node = stack
    for target, rest in ((aten.flatten.using_ints, (-2,)), (aten.to.dtype, (dtype,))):
        if node is not stack and node.meta["val"].dtype == dtype:
            break
        reader = sole_reader(node, target)
        if reader is None or reader.args[1:] != rest:
            return None
        node = reader
    return node if node.meta["val"].dtype == dtype else None
