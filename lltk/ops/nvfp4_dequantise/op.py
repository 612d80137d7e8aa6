"""``lltk::nvfp4_dequantise``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_dequantise import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


nvfp4_dequantise = torch.library.custom_op(
    "lltk::nvfp4_dequantise", reference.nvfp4_dequantise, mutates_args=()
)
"""See `reference.nvfp4_dequantise`."""


@nvfp4_dequantise.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    decode_scale: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    *rows, half = codes.shape
    return codes.new_empty((*rows, 2 * half), dtype=dtype)
