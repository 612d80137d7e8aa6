"""Norm and SiLU behind cached frames, in torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor

CACHED = 2
"""How many frames of earlier calls a causal convolution over three frames reads."""
EPS = 1e-12
"""Least length that a norm divides by."""


def cached_norm_silu(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    cache: Tensor | None = None,
    keep: bool = False,
) -> list[Tensor]:
    """The input of a causal convolution, and the cache for its next call, from an earlier result.

    s = x + bias + residual, rounded as x is; frames = [cache, silu(s / max(‖s‖, 1e-12) · √C · γ)],
    ‖s‖ over channels. Computed in float32, or in float64 if x is; everything given lies in memory
    with channels last.

    Args:
        x: [B, C, T, H, W], any T ≥ 1.
        gamma: γ, of C elements.
        bias: [C]; None for none.
        residual: as x; None for none.
        cache: [B, C, 2, H, W]; None for frames of zeros, as at a video's beginning.
        keep: whether s is wanted.

    Returns:
        frames [B, C, 2 + T, H, W]; their last two; s, if `keep`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    if bias is not None:
        total = total + bias.to(wide).view(-1, 1, 1, 1)
    if residual is not None:
        total = total + residual
    total = total.to(x.dtype)
    width = x.shape[1]
    length = torch.linalg.vector_norm(total.to(wide), dim=1, keepdim=True).clamp_min(EPS)
    normed = total.to(wide) / length * width**0.5 * gamma.to(wide).view(-1, 1, 1, 1)
    made = torch.nn.functional.silu(normed).to(x.dtype)
    if cache is None:
        cache = x.new_zeros((x.shape[0], width, CACHED, *x.shape[3:]))
    frames = torch.cat([cache, made], dim=2)
    given = [frames, frames[:, :, -CACHED:], *([total] if keep else [])]
    return [part.clone(memory_format=torch.channels_last_3d) for part in given]
