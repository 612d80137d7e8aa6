"""``lltk::nvfp4_paged_attention`` and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.attention_gradients import add_gradients
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


nvfp4_paged_attention_backward = add_gradients(
    nvfp4_paged_attention, reference.nvfp4_paged_attention_backward
)
"""See `reference.nvfp4_paged_attention_backward`."""
