"""Rows in FP8, read back."""

from __future__ import annotations

import torch
from torch import Tensor


def fp8_dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes · scales in float32, rounded to a dtype; reads what `fp8_quantise` returns.

    Args:
        codes: float8_e4m3fn [..., K].
        scales: float32 [..., 1].
        dtype: of the result.

    Returns:
        [..., K], contiguous.
    """
    return (codes.float() * scales).to(dtype).contiguous()
