"""Attention's result in FP8, centred again and quantised, one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.fp8_rows import fp8_quantise


def fp8_quantise_centred(
    x: Tensor, scale: Tensor, centre: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantise x / scale + centre, rounded to a dtype; a token's heads make one FP8 row.

    Args:
        x: float8_e4m3fn [B, L, H, D], with its scale, float32 [].
        centre: float32 or bfloat16 [B, 1, H, D].
        dtype: of the sum.

    Returns:
        What `fp8_quantise` makes of [B, L, H · D].
    """
    return fp8_quantise((x.float() / scale + centre).to(dtype).flatten(2))
