"""``lltk::fp8_matmul``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_matmul import reference

DECLARATION = Declaration(Exactness.REFERENCE, "decodes operands to float32")


fp8_matmul = torch.library.custom_op("lltk::fp8_matmul", reference.fp8_matmul, mutates_args=())
"""See `reference.fp8_matmul`."""


@fp8_matmul.register_fake
def _(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    torch._check(a.shape[-1] == b.shape[-1])
    torch._check(a_scales.shape == (*a.shape[:-1], 1) and b_scales.shape == (b.shape[0], 1))
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)
