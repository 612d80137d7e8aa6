"""A product of rows in FP8 as an exported engine makes it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "torch, rounded where an exported engine rounds, to judge it beforehand",
    simulates=True,
)


def fp8_matmul(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As the op, but rounded to bfloat16 before the scales, and to ``dtype`` before the bias."""
    product = (a.float() @ b.float().t()).bfloat16().float()
    scaled = (product * a_scales * b_scales.flatten()).to(dtype)
    return scaled if bias is None else scaled + bias
