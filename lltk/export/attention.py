"""Attention over operands that are given, and over pages that a mask lists."""

from __future__ import annotations

import torch
from torch import fx

from lltk.export.emitter import Emitter, cast, emits, like, source
from lltk.ops.implementations import overload

aten = torch.ops.aten
HEADS_FIRST = [0, 2, 1, 3]


@emits(aten.scaled_dot_product_attention.default)
def _attention(
    to: Emitter,
    node: fx.Node,
    q: str,
    k: str,
    v: str,
    mask: str = "",
    dropout: float = 0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> str:
    assert not dropout and not causal, f"{node.name} drops weights, or is causal"
    return to.op("Attention", q, k, v, mask, **({} if scale is None else {"scale": scale}))


@emits(overload("listed_attention"))
def _listed_attention(
    to: Emitter, node: fx.Node, q: str, k: str, v: str, k_pages: str, v_pages: str, listed: str
) -> str:
    operands, mask = listed_operands(to, node, q, k, v, k_pages, v_pages, listed)
    _, pages, tokens, *_ = source(node, 3).shape
    length = like(node).shape[1]
    mask = to.op(  # ONNX Runtime wants a row for every query
        "Expand", mask, to.ints(1, 1, length, pages * tokens + length)
    )
    return to.op("Transpose", to.op("Attention", *operands, mask), perm=HEADS_FIRST)


def listed_operands(
    to: Emitter, node: fx.Node, q: str, k: str, v: str, k_pages: str, v_pages: str, listed: str
) -> tuple[list[str], str]:
    """Queries, keys and values of ``listed_attention``, [B, H, L, D], and their mask [1, 1, 1, L].

    The keys of all pages come before the chunk's own. Pages that are not listed are read as zeros,
    for a NaN under the mask would be seen.
    """
    _, pages, tokens, *rest = source(node, 3).shape
    length = source(node, 1).shape[1]
    by_page = to.op("Reshape", listed, to.ints(1, pages, 1, 1, 1))

    def joined(own: str, arena: str, index: int) -> str:
        before = source(node, index).dtype
        finite = to.op("Where", by_page, arena, to.constant(0, before))
        held = to.op("Reshape", finite, to.ints(1, pages * tokens, *rest))
        return to.op("Concat", cast(to, held, before, like(node).dtype), own, axis=1)

    by_key = to.op("Expand", to.op("Reshape", listed, to.ints(pages, 1)), to.ints(pages, tokens))
    of_pages = to.op("Reshape", by_key, to.ints(1, 1, 1, pages * tokens))
    mask = to.op("Concat", of_pages, to.constant([[[[True] * length]]], torch.bool), axis=3)
    operands = [
        to.op("Transpose", each, perm=HEADS_FIRST)
        for each in (q, joined(k, k_pages, 3), joined(v, v_pages, 4))
    ]
    return operands, mask
