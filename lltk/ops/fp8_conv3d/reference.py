"""A convolution of FP8 operands."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv3d

TAPS = 27
"""How many taps a convolution over 3×3×3 has."""


def fp8_conv3d(
    frames: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """conv3d(frames · scale, weight · weight_scales) + bias over 3×3×3, summed in float32.

    Args:
        frames: float8_e4m3fn [B, C, 2 + T, H + 2, W + 2], with their scale, float32 [].
        weight: float8_e4m3fn [O, 27 · C], rows as `fold_taps` makes them, with scales float32
            [O, 1].
        bias: [O], added before the result is rounded.
        dtype: of the result.

    Returns:
        [B, O, T, H, W], channels last in memory.
    """
    taps = unfold_taps(weight.float() * weight_scales)
    made = conv3d(frames.float() * scale, taps, None if bias is None else bias.float())
    return made.to(dtype).contiguous(memory_format=torch.channels_last_3d)


def fold_taps(weight: Tensor) -> Tensor:
    """[O, C, 3, 3, 3] as rows [O, 27 · C], channels last."""
    return weight.permute(0, 2, 3, 4, 1).flatten(1)


def unfold_taps(rows: Tensor) -> Tensor:
    """`fold_taps`'s inverse."""
    return rows.unflatten(1, (3, 3, 3, -1)).permute(0, 4, 1, 2, 3)
