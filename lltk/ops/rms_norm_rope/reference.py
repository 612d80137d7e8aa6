"""RMS norm over all heads, then rotary positions, one after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lltk.ops.floats import round_e4m3


def rms_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, to: str = "plain"
) -> Tensor:
    """Heads of x / √(mean(x²) + eps) · weight, rounded as x is, rotated in float32, rounded again.

    A pair (a, b) of adjacent channels becomes (a cos − b sin, a sin + b cos).

    Args:
        x: [B, L, H · D], normed over H · D.
        weight: [H · D].
        cos, sin: float32 [1, L, 1, D]. Each number is there twice, as diffusers has it. The even
            channels of cos and the odd channels of sin are read.
        eps: of the norm.
        to: ``"plain"`` for x's dtype; ``"e4m3"`` for the E4M3 values nearest to what that gives.

    Returns:
        [B, L, H, D].
    """
    heads = F.rms_norm(x, (x.shape[-1],), weight, eps).unflatten(2, (-1, cos.shape[-1]))
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    turned = turned.flatten(-2).to(x.dtype)
    return round_e4m3(turned) if to == "e4m3" else turned
