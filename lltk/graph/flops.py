"""Floating-point operations of a Program's products, counted from its graphs."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from lltk.graph.edit import op_of, shape
from lltk.graph.facts import Ranks
from lltk.graph.program import Program
from lltk.graph.regions import nodes_of_pass
from lltk.ops.block_causal_attention.reference import chunks
from lltk.ops.implementations import overload

aten = torch.ops.aten
BLOCK_CAUSAL_ATTENTION = overload("block_causal_attention")
NVFP4_LINEAR = overload("nvfp4_linear")


def forward_flops(program: Program, graph: str) -> int:
    """Operations of a pass: of a graph's linears, convolutions and attention, 2 a product.

    Attention counts the pairs of a query and a key that the mask allows. Where several ranks share
    a clip, it is what one of them does.
    """
    return sum(_flops(node) for node in nodes_of_pass(program, graph))


def training_flops(program: Program) -> int:
    """Operations of a forward and a backward pass over the clips of a call, on all of their ranks.

    A backward pass takes twice a forward pass. What is computed twice to save memory counts once,
    as in the model FLOPs of PaLM (arXiv 2204.02311, appendix B).
    """
    return 3 * forward_flops(program, program.kind) * program.fact(Ranks).count


def _flops(node: fx.Node) -> int:
    operands: list[Any] = [each for each in node.args if isinstance(each, fx.Node)]
    op = op_of(node)
    if op is aten.linear.default or op is NVFP4_LINEAR:
        return 2 * prod(shape(operands[0])) * shape(operands[1])[0]
    if op is aten.conv3d.default:
        return 2 * prod(shape(node)) * prod(shape(operands[1])[1:])
    if op is aten.scaled_dot_product_attention.default:
        return 4 * prod(shape(operands[0])) * shape(operands[1])[2]
    if op is BLOCK_CAUSAL_ATTENTION:
        batch, tokens, heads, width = shape(operands[0])
        settings: tuple[Any, ...] = (*node.args[3:], 1)[:3]
        pairs = sum(
            (own.stop - own.start) * (run.stop - run.start)
            for own, runs in chunks(tokens, *settings)
            for run in runs
        )
        return 4 * batch * heads * width * pairs
    return 0
