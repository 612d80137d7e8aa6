"""``lltk::nvfp4_quantise_calibrated``: activations by a constant scale; it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.nvfp4_quantise_calibrated import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch, rounded as an exported engine")


nvfp4_quantise_calibrated = torch.library.custom_op(
    "lltk::nvfp4_quantise_calibrated", reference.nvfp4_quantise_calibrated, mutates_args=()
)
"""See `reference.nvfp4_quantise_calibrated`."""


@nvfp4_quantise_calibrated.register_fake
def _(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(scale.dim() == 0)
    *rows, width = x.shape
    blocks = -(-width // BLOCK)
    return (
        x.new_empty((*rows, blocks * BLOCK // 2), dtype=torch.uint8),
        x.new_empty((*rows, blocks), dtype=torch.float8_e4m3fn),
    )
