"""Rows in FP8, each with a scale of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.floats import E4M3_MAX


def fp8_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to E4M3 so that the largest element of each becomes E4M3's maximum.

    scale = max |x| / 448, 1 for a row of zeros; value = e4m3(x / scale), to nearest even;
    x̂ = value · scale. A row that is not finite decodes to NaN.

    Args:
        x: [..., K], any floating dtype.

    Returns:
        Values, float8_e4m3fn [..., K], and scales, float32 [..., 1]; contiguous.
    """
    x = x.float().contiguous()
    scales = x.abs().amax(-1, keepdim=True) / E4M3_MAX
    scales = scales.masked_fill(scales == 0, 1.0)
    return (x / scales).to(torch.float8_e4m3fn), scales
