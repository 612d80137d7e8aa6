"""``lltk::nvfp4_paged_attention`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_paged_attention import reference

DECLARATION = Declaration(
    Exactness.REFERENCE, "decodes pages to float32, one softmax over them and the chunk"
)


nvfp4_paged_attention = torch.library.custom_op(
    "lltk::nvfp4_paged_attention", reference.nvfp4_paged_attention, mutates_args=()
)
"""See `reference.nvfp4_paged_attention`."""


@nvfp4_paged_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *pages: Tensor | None) -> Tensor:
    for own, codes in ((k, pages[0]), (v, pages[4])):
        assert codes is not None
        batch, _, _, heads, half = codes.shape
        torch._check((own.shape[0], *own.shape[2:]) == (batch, heads, 2 * half))
    return q.new_empty(q.shape)


nvfp4_paged_attention_backward = torch.library.custom_op(
    "lltk::nvfp4_paged_attention_backward",
    reference.nvfp4_paged_attention_backward,
    mutates_args=(),
)
"""See `reference.nvfp4_paged_attention_backward`."""


@nvfp4_paged_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *pages: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*nvfp4_paged_attention_backward(grad, *ctx.saved_tensors), *[None] * 9)


nvfp4_paged_attention.register_autograd(_backward, setup_context=_save)


OVERLOAD = torch.ops.lltk.nvfp4_paged_attention.default
"""The op as a graph node's target."""
