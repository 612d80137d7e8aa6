"""NVFP4 decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.floats import decode_e2m1, unpack
from lltk.ops.nvfp4_quantise.reference import expand


def block_values(codes: Tensor, scales: Tensor) -> Tensor:
    """e2m1(code) · scale, float32 [..., R, K]: exact in bfloat16 too."""
    values = decode_e2m1(unpack(codes)).unflatten(-1, (scales.shape[-1], -1))
    return (values * scales.float()[..., None]).flatten(-2)


def nvfp4_dequantise(
    codes: Tensor, scales: Tensor, decode_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """e2m1(code) · scale · decode scale.

    Args:
        codes: uint8 [..., R, K/2].
        scales: float8_e4m3fn [..., R, K/16].
        decode_scale: float32 [], or of the leading axes.
        dtype: of the result; products are float32's.

    Returns:
        [..., R, K].
    """
    values = block_values(codes, scales)
    return (values * expand(decode_scale, values.dim())).to(dtype)
