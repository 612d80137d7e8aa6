"""Blocks of a tensor whose scale is a constant."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.tensorrt_blocks import quantised_blocks


def nvfp4_quantise_calibrated(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x / scale in blocks, as `lltk.ops.tensorrt_blocks.quantised_blocks` rounds them.

    What exceeds 6 · 448 · scale saturates: a block's scale is 448 at most, and a code 6.

    Args:
        x: [..., K], floating point; K is padded with zeros to whole blocks.
        scale: float32 [], above 0.

    Returns:
        Codes, uint8 [..., K/2], and block scales, float8_e4m3fn [..., K/16]. An element is about
        e2m1(code) · block scale · scale.
    """
    wide = pad(x.float(), (0, -x.shape[-1] % BLOCK))
    return quantised_blocks(wide / scale)
