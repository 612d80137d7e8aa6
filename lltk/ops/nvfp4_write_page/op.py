"""``lltk::nvfp4_write_page``: the only op that changes a page in NVFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.nvfp4_write_page import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


nvfp4_write_page = torch.library.custom_op(
    "lltk::nvfp4_write_page",
    reference.nvfp4_write_page,
    mutates_args=("codes", "scales", "decode_scales", "means"),
)
"""See `reference.nvfp4_write_page`."""


@nvfp4_write_page.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    value: Tensor,
    slot: Tensor,
    rule: str = "none",
) -> None:
    batch, pages, tokens, heads, half = codes.shape
    torch._check(tuple(value.shape) == (batch, tokens, heads, 2 * half))
    torch._check(tuple(scales.shape) == (batch, pages, tokens, heads, 2 * half // BLOCK))
    torch._check(tuple(decode_scales.shape) == (batch, pages, heads))
    if means is not None:
        torch._check(tuple(means.shape) == (batch, pages, heads, 2 * half))
