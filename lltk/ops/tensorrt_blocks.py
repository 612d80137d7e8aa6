"""NVFP4 as an exported engine rounds it: the arithmetic of `lltk.export.tensorrt`, in torch.

A tensor is divided by its scale, and blocks are quantised as TensorRT's op for it documents: a
block's scale is e4m3(b / 6), b its largest magnitude, and a code is e2m1(x / scale). Rounding is
plain, and steps follow one another in another order than lltk's own, so codes differ where a tie or
a last bit does. No engine was run, so that this is what engines compute has not been seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.floats import E2M1_MAX, E4M3_MAX, pack, round_e2m1, round_e4m3
from lltk.ops.nvfp4_quantise.reference import BLOCK

TINY = 1e-30
"""A scale below it stands for zeros."""


def tensor_scale(largest: Tensor) -> Tensor:
    """The scale that brings the largest magnitude to what codes and scales can say at most.

    Of zeros it is 1, and of what is not finite it is not.
    """
    scale = largest * (1 / (E2M1_MAX * E4M3_MAX))
    return torch.where(scale < TINY, 1.0, scale)


def quantised_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block scales along the last axis, for a tensor scale of 1.

    Args:
        x: float32 [..., K], K a multiple of 16.

    Returns:
        Codes, uint8 [..., K/2], and scales, float8_e4m3fn [..., K/16].
    """
    blocks = x.unflatten(-1, (-1, BLOCK))
    scales = round_e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX)
    wide = scales.float()
    values = torch.where(wide == 0, 0.0, blocks / wide)
    return pack(round_e2m1(values.flatten(-2))), scales.squeeze(-1)
