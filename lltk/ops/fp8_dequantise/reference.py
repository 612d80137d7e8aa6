"""Rows in FP8, read back."""

from __future__ import annotations

import torch
from torch import Tensor


def fp8_dequantise(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, centre: Tensor | None = None
) -> Tensor:
    """codes · scales + centre in float32, rounded to a dtype.

    Without a centre it reads back what `fp8_quantise` returns.

    Args:
        codes: float8_e4m3fn [B, L, H, D].
        scales: float32 [B, L, H, 1], or [] for all.
        dtype: of the result.
        centre: float32 [B, 1, H, D].

    Returns:
        [B, L, H, D], contiguous.
    """
    values = codes.float() * scales
    return (values if centre is None else values + centre).to(dtype).contiguous()
