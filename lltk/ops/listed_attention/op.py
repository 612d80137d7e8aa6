"""``lltk::listed_attention``: what graphs for export attend with; it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.listed_attention import reference

DECLARATION = Declaration(Exactness.REFERENCE, "torch's attention over all pages, with a mask")


listed_attention = torch.library.custom_op(
    "lltk::listed_attention", reference.listed_attention, mutates_args=()
)
"""See `reference.listed_attention`."""


@listed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, listed: Tensor) -> Tensor:
    torch._check(k.shape[0] == k_pages.shape[0] and k.shape[2:] == k_pages.shape[3:])
    torch._check(listed.shape[0] == k_pages.shape[1])
    return q.new_empty(q.shape)
