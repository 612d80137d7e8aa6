"""Attention as captured: how to find it, and how to write it with tokens before heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lltk.graph.edit import Builder, calls, module_of, op_of
from lltk.graph.passes import Report
from lltk.graph.program import Program
from lltk.ops.implementations import overload

aten = torch.ops.aten
_SWAP = [0, 2, 1, 3]


@dataclass(frozen=True)
class Attention:
    """One dense attention of a graph.

    Attributes:
        layer: index of its block.
        node: the call of scaled_dot_product_attention, whose operands have heads before tokens.
        q, k, v, result: what goes in and comes out, [batch, tokens, heads, head dim].
    """

    layer: int
    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    result: fx.Node


def find_attention(
    program: Program, graph: fx.Graph, template: str, report: Report
) -> Iterator[Attention]:
    """The attentions in modules of a path with ``{layer}``, in order; reports those left out."""
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        layer = program.spec.layer_of(module_of(node), template)
        if layer is None:
            report.miss(node, f"is not in {template}")
        elif len(node.args) != 3 or node.kwargs:
            report.miss(node, "has a mask, dropout or scale")
        else:
            q, k, v = (_swapped(argument) for argument in node.args)
            result = next((u for u in node.users if _swapped(u) is node), None)
            if q is None or k is None or v is None or result is None:
                report.miss(node, f"its operands are not permuted by {_SWAP}")
            else:
                yield Attention(layer, node, q, k, v, result)


def _swapped(node: object) -> fx.Node | None:
    """What a permutation by [0, 2, 1, 3] reads; None for any other node."""
    if isinstance(node, fx.Node) and node.target is aten.permute.default:
        source, order = node.args
        if order == _SWAP and isinstance(source, fx.Node):
            return source
    return None


def attend(build: Builder, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Dense attention; operands and result are [batch, tokens, heads, head dim]."""
    heads_first = (build(aten.permute.default, t, _SWAP) for t in (q, k, v))
    out = build(aten.scaled_dot_product_attention.default, *heads_first)
    return build(aten.permute.default, out, _SWAP)


_PAGED = {
    overload(op): op
    for op in ("paged_attention", "nvfp4_paged_attention", "fp8_quantise_attention")
}


def paged_op(node: fx.Node) -> str | None:
    """The op of a call that attends to pages and the chunk in flight, lowered or not; or None."""
    return _PAGED.get(op_of(node))
