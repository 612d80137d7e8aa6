"""``lltk::fp8_quantise_gelu``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.fp8_quantise_gelu import reference


@torch.library.custom_op("lltk::fp8_quantise_gelu", mutates_args=())
def fp8_quantise_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.fp8_quantise_gelu`."""
    return reference.fp8_quantise_gelu(x)


@fp8_quantise_gelu.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scales


OVERLOAD = torch.ops.lltk.fp8_quantise_gelu.default
"""The op as a graph node's target."""
