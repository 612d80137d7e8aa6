"""The convolutions of a graph, and how much they compute."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from lltk.graph.edit import op_of, shape
from lltk.ops.implementations import overload

Operands = tuple[tuple[int, ...], tuple[int, ...]]
"""The shapes of a convolution's input and weight."""
_PLACES = {
    torch.ops.aten.conv3d.default: (0, 1),
    torch.ops.aten.conv2d.default: (0, 1),
    overload("fp8_conv3d"): (0, 2),
}
"""The places of both among its arguments."""


def convolutions(graph: fx.Graph) -> dict[Operands, tuple[int, int]]:
    """How many convolutions a graph makes, and their floating-point operations, by operands."""
    counted: dict[Operands, tuple[int, int]] = {}
    for conv in graph.nodes:
        places = _PLACES.get(op_of(conv))
        if places is not None:
            x, weight = (conv.args[place] for place in places)
            assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
            operands = (shape(x), shape(weight))
            count, flops = counted.get(operands, (0, 0))
            flops += 2 * prod(shape(conv)) * prod(shape(weight)[1:])
            counted[operands] = (count + 1, flops)
    return counted


def convolved(graph: fx.Graph) -> int:
    """The floating-point operations of all convolutions of a graph."""
    return sum(flops for _, flops in convolutions(graph).values())
