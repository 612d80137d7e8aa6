"""``lltk::block_causal_attention`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lltk.ops.block_causal_attention import reference
from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(Exactness.REFERENCE, "one masked softmax, summed in float32")


block_causal_attention = torch.library.custom_op(
    "lltk::block_causal_attention", reference.block_causal_attention, mutates_args=()
)
"""See `reference.block_causal_attention`."""


@block_causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int, teacher_forcing: bool) -> Tensor:
    torch._check(q.shape[1] % (chunk_tokens * (2 if teacher_forcing else 1)) == 0)
    return q.new_empty(q.shape)


block_causal_attention_backward = torch.library.custom_op(
    "lltk::block_causal_attention_backward",
    reference.block_causal_attention_backward,
    mutates_args=(),
)
"""See `reference.block_causal_attention_backward`."""


@block_causal_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int, teacher_forcing: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.chunk_tokens, ctx.teacher_forcing = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = block_causal_attention_backward(
        grad, *ctx.saved_tensors, ctx.chunk_tokens, ctx.teacher_forcing
    )
    return (*grads, None, None)


block_causal_attention.register_autograd(_backward, setup_context=_save)


OVERLOAD = torch.ops.lltk.block_causal_attention.default
"""The op as a graph node's target."""
