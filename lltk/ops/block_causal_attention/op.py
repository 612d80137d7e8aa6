"""``lltk::block_causal_attention`` and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.attention_gradients import add_gradients
from lltk.ops.block_causal_attention import reference
from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(Exactness.REFERENCE, "one masked softmax, summed in float32")


block_causal_attention = torch.library.custom_op(
    "lltk::block_causal_attention", reference.block_causal_attention, mutates_args=()
)
"""See `reference.block_causal_attention`."""


@block_causal_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int, teacher_forcing: bool, ranks: int = 1
) -> Tensor:
    torch._check(q.shape[1] % (chunk_tokens * (2 * ranks if teacher_forcing else 1)) == 0)
    return q.new_empty(q.shape)


block_causal_attention_backward = add_gradients(
    block_causal_attention, reference.block_causal_attention_backward
)
"""See `reference.block_causal_attention_backward`."""
