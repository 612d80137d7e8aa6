"""A block-scaled product as an exported engine makes it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_matmul import reference

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "torch, rounded where an exported engine rounds, to judge it beforehand",
    simulates=True,
)


def nvfp4_matmul(
    a_codes: Tensor,
    a_scales: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """As the op, but the product is rounded to bfloat16 before ``a``'s scale multiplies it."""
    one = torch.ones_like(a_scale)
    operands = a_codes, a_scales, one, b_codes, b_scales, b_scale
    product = reference.nvfp4_matmul(*operands, torch.bfloat16)
    return (product.float() * a_scale).to(dtype)
