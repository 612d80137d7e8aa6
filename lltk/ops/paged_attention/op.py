"""``lltk::paged_attention`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.paged_attention import reference

DECLARATION = Declaration(
    Exactness.REFERENCE, "one softmax over pages and chunk, summed in float32"
)


paged_attention = torch.library.custom_op(
    "lltk::paged_attention", reference.paged_attention, mutates_args=()
)
"""See `reference.paged_attention`."""


@paged_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor) -> Tensor:
    torch._check(k.shape[0] == k_pages.shape[0] and k.shape[2:] == k_pages.shape[3:])
    return q.new_empty(q.shape)


paged_attention_backward = torch.library.custom_op(
    "lltk::paged_attention_backward", reference.paged_attention_backward, mutates_args=()
)
"""See `reference.paged_attention_backward`."""


@paged_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*paged_attention_backward(grad, *ctx.saved_tensors), None, None, None)


paged_attention.register_autograd(_backward, setup_context=_save)


OVERLOAD = torch.ops.lltk.paged_attention.default
"""The op as a graph node's target."""
