"""``lltk::fp8_quantise``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


@torch.library.custom_op("lltk::fp8_quantise", mutates_args=())
def fp8_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.fp8_quantise`."""
    return reference.fp8_quantise(x)


@fp8_quantise.register_fake
def new_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where x's values in FP8 and its rows' scales go, not filled."""
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scales


OVERLOAD = torch.ops.lltk.fp8_quantise.default
"""The op as a graph node's target."""
