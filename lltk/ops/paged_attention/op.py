"""``lltk::paged_attention`` and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.attention_gradients import add_gradients
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


paged_attention_backward = add_gradients(paged_attention, reference.paged_attention_backward)
"""See `reference.paged_attention_backward`."""
