"""Linears, embeddings, norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lltk.export.emitter import Emitter, emits, like

aten = torch.ops.aten


@emits(aten.linear.default)
def _linear(to: Emitter, node: fx.Node, x: str, weight: str, bias: str | None = None) -> str:
    made = to.op("MatMul", x, to.parameter(weight, transposed=True))
    return made if bias is None else to.op("Add", made, bias)


@emits(aten.embedding.default)
def _embedding(to: Emitter, node: fx.Node, weight: str, index: str) -> str:
    return to.op("Gather", weight, index, axis=0)


@emits(aten.layer_norm.default)
def _layer_norm(
    to: Emitter,
    node: fx.Node,
    x: str,
    shape: Sequence[int],
    weight: str | None = None,
    bias: str | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> str:
    scale = to.constant([1.0] * shape[-1], like(node).dtype) if weight is None else weight
    assert len(shape) == 1, f"{node.name} takes {len(shape)} axes at once"
    return to.op("LayerNormalization", x, scale, bias or "", axis=-1, epsilon=eps)


@emits(aten.rms_norm.default)
def _rms_norm(
    to: Emitter, node: fx.Node, x: str, shape: Sequence[int], weight: str, eps: float
) -> str:
    assert len(shape) == 1, f"{node.name} takes {len(shape)} axes at once"
    return to.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)


@emits(aten.linalg_vector_norm.default)
def _vector_norm(
    to: Emitter, node: fx.Node, x: str, order: float, axes: Sequence[int], keep: bool = False
) -> str:
    assert order == 2, f"{node.name} is the {order}-norm"
    return to.op("ReduceL2", x, to.ints(*axes), keepdims=int(keep))
