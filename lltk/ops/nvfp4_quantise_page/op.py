"""``lltk::nvfp4_quantise_page``: what graphs for export make pages with; it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.nvfp4_quantise_page import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


nvfp4_quantise_page = torch.library.custom_op(
    "lltk::nvfp4_quantise_page", reference.nvfp4_quantise_page, mutates_args=()
)
"""See `reference.nvfp4_quantise_page`."""


@nvfp4_quantise_page.register_fake
def _(value: Tensor, smoothing: bool, rule: str = "none") -> list[Tensor]:
    batch, tokens, heads, width = value.shape
    torch._check(width % BLOCK == 0)
    page, head = (batch, tokens, heads), (batch, heads)
    means = [value.new_empty((*head, width), dtype=torch.bfloat16)] if smoothing else []
    return [
        value.new_empty((*page, width // 2), dtype=torch.uint8),
        value.new_empty((*page, width // BLOCK), dtype=torch.float8_e4m3fn),
        value.new_empty(head, dtype=torch.float32),
        *means,
    ]
