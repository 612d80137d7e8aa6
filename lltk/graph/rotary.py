"""Rotary positions as captured: how to find a rotation, and how to write one."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lltk.graph.edit import Builder, shape
from lltk.graph.match import is_call, sole_reader

aten = torch.ops.aten


@dataclass(frozen=True)
class Rotation:
    """Heads that are turned by their tokens' positions.

    Attributes:
        heads: what is turned, [B, L, H, D].
        cos, sin: float32 [1, L, 1, D], as `lltk::rope_table` gives them.
        turned: the result, of the heads' shape and dtype.
    """

    heads: fx.Node
    cos: fx.Node
    sin: fx.Node
    turned: fx.Node


def rotate(
    build: Builder, heads: fx.Node, cos: fx.Node, sin: fx.Node, dtype: torch.dtype
) -> fx.Node:
    """A pair (a, b) of adjacent channels becomes (a cos − b sin, a sin + b cos).

    Args:
        build: inserts the nodes.
        heads: [B, L, H, D].
        cos, sin: float32 [1, L, 1, D].
        dtype: of the heads. They are turned in float32 or wider and then rounded to it.
    """
    pairs = build(aten.unbind.int, build(aten.unflatten.int, heads, -1, [-1, 2]), -1)
    a, b = (build(operator.getitem, pairs, index) for index in (0, 1))
    c = build(aten.slice.Tensor, cos, 3, 0, sys.maxsize, 2)
    s = build(aten.slice.Tensor, sin, 3, 1, sys.maxsize, 2)
    mul = aten.mul.Tensor
    even = build(aten.sub.Tensor, build(mul, a, c), build(mul, b, s))
    odd = build(aten.add.Tensor, build(mul, a, s), build(mul, b, c))
    turned = build(aten.flatten.using_ints, build(aten.stack.default, [even, odd], -1), -2)
    wide = torch.promote_types(dtype, torch.float32) == dtype
    return turned if wide else build(aten.to.dtype, turned, dtype)


def find_rotation(stack: fx.Node) -> Rotation | None:
    """The rotation whose result a stack [a cos − b sin, a sin + b cos] is; or None."""
    parts: Any = stack.args[0]
    if len(parts) != 2 or stack.args[1:] != (-1,) or not is_call(parts[0], aten.sub.Tensor):
        return None
    products = [product for part in parts for product in part.args[:2]]
    if not is_call(parts[1], aten.add.Tensor) or not _all_calls(products, aten.mul.Tensor):
        return None
    (even, cos), (odd, sin), *others = (product.args for product in products)
    heads = _heads(even, odd)
    if others != [(even, sin), (odd, cos)] or heads is None:
        return None
    tables = _table(cos, 0), _table(sin, 1)
    turned = _rounded(stack, heads.meta["val"].dtype)
    if turned is None or any(table is None for table in tables):
        return None
    batch, *_, width = shape(tables[0])
    fits = batch == 1 and shape(turned) == shape(heads) and shape(heads)[-1] == width
    return Rotation(heads, *tables, turned) if fits else None


def _all_calls(nodes: list[Any], target: Any) -> bool:
    return all(is_call(node, target) for node in nodes)


def _heads(even: Any, odd: Any) -> Any:
    """The heads whose pairs of channels these are; or None."""
    if not _all_calls([even, odd], operator.getitem) or (even.args[1], odd.args[1]) != (0, 1):
        return None
    pairs = even.args[0]
    if pairs is not odd.args[0] or not is_call(pairs, aten.unbind.int) or pairs.args[1] != -1:
        return None
    pairs = pairs.args[0]
    if not is_call(pairs, aten.unflatten.int) or pairs.args[1:] != (-1, [-1, 2]):
        return None
    return pairs.args[0]


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
