"""Recognising patterns in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lltk.graph.edit import shape

aten = torch.ops.aten


def is_call(node: Any, target: Any) -> bool:
    """Whether it is a call of an operator."""
    return isinstance(node, fx.Node) and node.target == target


def read_once(node: Any, target: Any) -> bool:
    """Whether it is a call of an operator with one reader."""
    return is_call(node, target) and len(node.users) == 1


def sole_reader(node: fx.Node, target: Any) -> fx.Node | None:
    """The only reader of a node, if there is only one and it calls the operator; else None."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and is_call(readers[0], target) else None


def operands(node: Any, target: Any) -> tuple[Any, Any]:
    """The first two arguments of a call with one reader; None and None for anything else."""
    if not read_once(node, target):
        return None, None
    return node.args[0], node.args[1]


def before_cast(node: Any) -> Any:
    """What a cast reads; the node itself if it is no cast."""
    return node.args[0] if is_call(node, aten.to.dtype) else node


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The nodes that a node is computed from, near and far."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - found
        found |= new
        pending += new
    return found


def is_of_rows(scale: Any, x: fx.Node) -> bool:
    """Whether a scale is float32 [D], or [B, F, 1, D] for the frames of tokens [B, F · T, D]."""
    if not isinstance(scale, fx.Node) or scale.meta["val"].dtype != torch.float32:
        return False
    (batch, *_, width), sizes = shape(x), shape(scale)
    return sizes == (width,) or (len(sizes) == 4 and (sizes[0], *sizes[2:]) == (batch, 1, width))
