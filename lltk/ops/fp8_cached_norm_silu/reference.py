"""Norm and SiLU behind cached frames, in E4M3."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lltk.ops.cached_norm_silu.reference import CACHED, cached_norm_silu
from lltk.ops.floats import E4M3_MAX, reciprocal, round_e4m3


def fp8_cached_norm_silu(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    cache: Tensor | None = None,
    keep: bool = False,
) -> list[Tensor]:
    """The frames of `cached_norm_silu`, rounded as it says, then to E4M3; zeros about each image.

    scale = √C · max |γ| / 448, 1 if γ is zero: no element of a norm is larger than √C · max |γ|,
    and SiLU makes none larger. value = e4m3(x · (1 / scale)).

    Args:
        x, gamma, bias, residual, keep: as `cached_norm_silu`'s.
        cache: float8_e4m3fn [B, C, 2, H, W], of the same γ; None for zeros.

    Returns:
        frames, float8_e4m3fn [B, C, 2 + T, H + 2, W + 2]; their last two without the zeros about
        them, [B, C, 2, H, W]; the scale, float32 []; the sum, if `keep`.
    """
    made, _, *total = cached_norm_silu(x, gamma, bias, residual, None, keep)
    peak = gamma.float().abs().amax()
    scale = (peak * (x.shape[1] ** 0.5 / E4M3_MAX)).masked_fill(peak == 0, 1.0)
    codes = round_e4m3(made[:, :, CACHED:].float() * reciprocal(scale)).view(torch.uint8)
    held = (*codes.shape[:2], CACHED, *codes.shape[3:])
    before = codes.new_zeros(held) if cache is None else cache.view(torch.uint8)
    codes = torch.cat([before, codes], dim=2)
    frames, kept = (
        part.clone(memory_format=torch.channels_last_3d).view(torch.float8_e4m3fn)
        for part in (pad(codes, (1, 1, 1, 1)), codes[:, :, -CACHED:])
    )
    return [frames, kept, scale, *total]
