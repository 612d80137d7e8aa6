"""``lltk::fp8_quantise_gelu``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise.op import new_fp8
from lltk.ops.fp8_quantise_gelu import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


@torch.library.custom_op("lltk::fp8_quantise_gelu", mutates_args=())
def fp8_quantise_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.fp8_quantise_gelu`."""
    return reference.fp8_quantise_gelu(x)


@fp8_quantise_gelu.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return new_fp8(x)


OVERLOAD = torch.ops.lltk.fp8_quantise_gelu.default
"""The op as a graph node's target."""
