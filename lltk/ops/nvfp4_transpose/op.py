"""``lltk::nvfp4_transpose``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.nvfp4_transpose import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


nvfp4_transpose = torch.library.custom_op(
    "lltk::nvfp4_transpose", reference.nvfp4_transpose, mutates_args=()
)
"""See `reference.nvfp4_transpose`."""


@nvfp4_transpose.register_fake
def new_transpose(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors for the results."""
    rows, half = codes.shape
    blocks = (rows + BLOCK - 1) // BLOCK
    return (
        codes.new_empty((2 * half, blocks * BLOCK // 2)),
        scales.new_empty((2 * half, blocks)),
    )
