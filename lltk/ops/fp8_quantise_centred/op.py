"""``lltk::fp8_quantise_centred``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise_centred import reference
from lltk.ops.fp8_rows import new_fp8

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


fp8_quantise_centred = torch.library.custom_op(
    "lltk::fp8_quantise_centred", reference.fp8_quantise_centred, mutates_args=()
)
"""See `reference.fp8_quantise_centred`."""


@fp8_quantise_centred.register_fake
def _(x: Tensor, scale: Tensor, centre: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = x.shape
    torch._check(tuple(centre.shape) == (batch, 1, heads, width))
    return new_fp8(x.flatten(2))
