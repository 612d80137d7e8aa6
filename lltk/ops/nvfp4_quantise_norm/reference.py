"""Layer norm, modulation and quantisation, one after another."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lltk.ops.nvfp4_quantise.reference import Quantised, nvfp4_quantise


def nvfp4_quantise_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, rule: str = "none"
) -> Quantised:
    """norm(x) · scale + shift, computed in float32 and rounded as x is, in blocks of 1×16.

    norm(x) = (x − mean) / √(variance + eps) over the last axis, the variance biased.

    Args:
        x: [..., D], R rows in all, D a multiple of 16.
        scale, shift: float32 of G rows of D each, G a divisor of R: one for R / G rows in order.
        eps: of the norm.
        rule: see `nvfp4_quantise`.
    """
    width = x.shape[-1]
    rows = F.layer_norm(x.float(), (width,), eps=eps).view(-1, width)
    groups = rows.unflatten(0, (scale.numel() // width, -1))
    changed = groups * scale.reshape(-1, 1, width) + shift.reshape(-1, 1, width)
    return nvfp4_quantise(changed.view(x.shape).to(x.dtype), 1, rule)
