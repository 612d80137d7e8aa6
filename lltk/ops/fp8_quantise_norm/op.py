"""``lltk::fp8_quantise_norm``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise.op import new_fp8
from lltk.ops.fp8_quantise_norm import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


@torch.library.custom_op("lltk::fp8_quantise_norm", mutates_args=())
def fp8_quantise_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.fp8_quantise_norm`."""
    return reference.fp8_quantise_norm(x, scale, shift, eps)


@fp8_quantise_norm.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    torch._check(scale.shape[-1] == x.shape[-1] and shift.shape == scale.shape)
    return new_fp8(x)


OVERLOAD = torch.ops.lltk.fp8_quantise_norm.default
"""The op as a graph node's target."""
