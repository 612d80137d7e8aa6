"""``lltk::nvfp4_gather_fp8``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_gather_fp8 import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch, rounded to E4M3")


nvfp4_gather_fp8 = torch.library.custom_op(
    "lltk::nvfp4_gather_fp8", reference.nvfp4_gather_fp8, mutates_args=()
)
"""See `reference.nvfp4_gather_fp8`."""


@nvfp4_gather_fp8.register_fake
def new_gathered(
    own: Tensor,
    centre: Tensor,
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Empty tensors for the results."""
    batch, length, heads, width = own.shape
    torch._check(tuple(centre.shape) == (batch, 1, heads, width))
    size = (batch, table.shape[0] * codes.shape[2] + length, heads, width)
    return own.new_empty(size, dtype=torch.float8_e4m3fn), own.new_empty((), dtype=torch.float32)
