"""``lltk::nvfp4_matmul``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_matmul import reference

DECLARATION = Declaration(Exactness.REFERENCE, "decodes operands to float32")


nvfp4_matmul = torch.library.custom_op(
    "lltk::nvfp4_matmul", reference.nvfp4_matmul, mutates_args=()
)
"""See `reference.nvfp4_matmul`."""


@nvfp4_matmul.register_fake
def _(
    a_codes: Tensor,
    a_scales: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    torch._check(a_codes.shape[-1] == b_codes.shape[-1])
    torch._check(a_scales.shape[-1] * 8 == a_codes.shape[-1])
    return a_codes.new_empty((*a_codes.shape[:-1], b_codes.shape[0]), dtype=dtype)
