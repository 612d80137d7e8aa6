"""``lltk::nvfp4_decode_pages``: what graphs for export read pages with; it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_decode_pages import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


nvfp4_decode_pages = torch.library.custom_op(
    "lltk::nvfp4_decode_pages", reference.nvfp4_decode_pages, mutates_args=()
)
"""See `reference.nvfp4_decode_pages`."""


@nvfp4_decode_pages.register_fake
def _(codes: Tensor, scales: Tensor, decode_scales: Tensor, means: Tensor | None) -> Tensor:
    *page, half = codes.shape
    return codes.new_empty((*page, 2 * half), dtype=torch.float32)
