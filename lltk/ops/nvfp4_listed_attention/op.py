"""``lltk::nvfp4_listed_attention``: what graphs for export attend with; it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_listed_attention import reference

DECLARATION = Declaration(
    Exactness.REFERENCE, "decodes all pages to float32, then torch's attention with a mask"
)


nvfp4_listed_attention = torch.library.custom_op(
    "lltk::nvfp4_listed_attention", reference.nvfp4_listed_attention, mutates_args=()
)
"""See `reference.nvfp4_listed_attention`."""


@nvfp4_listed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_codes: Tensor, *rest: Tensor | None) -> Tensor:
    listed = rest[-1]
    assert listed is not None
    torch._check(k.shape[0] == k_codes.shape[0] and k.shape[2] == k_codes.shape[3])
    torch._check(k.shape[3] == 2 * k_codes.shape[4] and listed.shape[0] == k_codes.shape[1])
    return q.new_empty(q.shape)
