"""``lltk::nvfp4_quantise_norm``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.nvfp4_quantise_norm import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


@torch.library.custom_op("lltk::nvfp4_quantise_norm", mutates_args=())
def nvfp4_quantise_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    rule: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nvfp4_quantise_norm`."""
    codes, scales, decode_scale = reference.nvfp4_quantise_norm(x, scale, shift, eps, rule)
    return codes, scales, decode_scale


@nvfp4_quantise_norm.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    rule: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape[:-1], x.shape[-1]
    torch._check(width % BLOCK == 0)
    return (
        x.new_empty((*rows, width // 2), dtype=torch.uint8),
        x.new_empty((*rows, width // BLOCK), dtype=torch.float8_e4m3fn),
        x.new_empty((), dtype=torch.float32),
    )


OVERLOAD = torch.ops.lltk.nvfp4_quantise_norm.default
"""The op as a graph node's target."""
