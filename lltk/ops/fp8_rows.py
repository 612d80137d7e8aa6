"""Rows in FP8, each with a scale of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.floats import E4M3_MAX, reciprocal


def fp8_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to E4M3 so that the largest element of each becomes E4M3's maximum.

    scale = max |x| / 448, or 1 for a row of zeros. value = e4m3(x · (1 / scale)). Every step rounds
    to nearest even. The row is read back as x̂ = value · scale.

    A row that holds an infinity or NaN is read back as NaN. A row whose largest element is below
    1.4e-36 loses some precision, because 1 / scale is at most float32's largest number.

    Args:
        x: [..., K], any floating dtype.

    Returns:
        Values, float8_e4m3fn [..., K], and scales, float32 [..., 1]; contiguous.
    """
    x = x.float().contiguous()
    # Divided by a tensor: by a number, a GPU would multiply by the reciprocal instead.
    scales = x.abs().amax(-1, keepdim=True) / x.new_full((), E4M3_MAX)
    scales = scales.masked_fill(scales == 0, 1.0)
    return (x * reciprocal(scales)).to(torch.float8_e4m3fn), scales


def new_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors for what `fp8_quantise` returns."""
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scales
