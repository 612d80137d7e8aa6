"""``lltk::fp8_dequantise``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_dequantise import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


fp8_dequantise = torch.library.custom_op(
    "lltk::fp8_dequantise", reference.fp8_dequantise, mutates_args=()
)
"""See `reference.fp8_dequantise`."""


@fp8_dequantise.register_fake
def _(codes: Tensor, scales: Tensor, dtype: torch.dtype, centre: Tensor | None = None) -> Tensor:
    batch, _, heads, width = codes.shape
    torch._check(scales.dim() == 0 or scales.shape == (*codes.shape[:-1], 1))
    torch._check(centre is None or centre.shape == (batch, 1, heads, width))
    return codes.new_empty(codes.shape, dtype=dtype)
