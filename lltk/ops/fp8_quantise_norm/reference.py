"""Layer norm, modulation and quantisation to FP8, one after another."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lltk.ops.fp8_quantise.reference import fp8_quantise


def fp8_quantise_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """norm(x) · scale + shift, computed in float32 and rounded as x is, as FP8 rows.

    norm(x) = (x − mean) / √(variance + eps) over the last axis, the variance biased.

    Args:
        x: [..., D], R rows in all.
        scale, shift: float32 of G rows of D each, G a divisor of R: one for R / G rows in order.
        eps: of the norm.

    Returns:
        What `fp8_quantise` makes of it.
    """
    width = x.shape[-1]
    rows = F.layer_norm(x.float(), (width,), eps=eps).reshape(-1, width)
    groups = rows.unflatten(0, (scale.numel() // width, -1))
    changed = groups * scale.reshape(-1, 1, width) + shift.reshape(-1, 1, width)
    return fp8_quantise(changed.view(x.shape).to(x.dtype))
