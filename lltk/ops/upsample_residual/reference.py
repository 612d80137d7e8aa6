"""A folded upsampling's phases interleaved and its shortcut added, in torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor


def fold(weight: Tensor) -> Tensor:
    """Weights on a small image of a convolution over its nearest-neighbour enlargement.

    Rows 2i and 2i + 1 of the enlargement are row i, so three taps fall on two rows: w₀ and w₁ + w₂
    for even rows of the result, w₀ + w₁ and w₂ for odd ones. The sums are rounded as `weight` is.

    Args:
        weight: [O, I, 3, 3].

    Returns:
        [4·O, I, 2, 2], the phases (row, column) in order 00, 01, 10, 11.
    """
    phases = [both for rows in _fold(weight.to(_wide(weight)), 2) for both in _fold(rows, 3)]
    return torch.cat(phases).to(weight.dtype)


def unfold(phases: Tensor) -> Tensor:
    """What `fold` was given, but for rounding: [4·O, I, 2, 2] → [O, I, 3, 3]."""
    p00, p01, p10, p11 = phases.to(_wide(phases)).chunk(4)
    return _unfold(_unfold(p00, p01, 3), _unfold(p10, p11, 3), 2).to(phases.dtype)


def _fold(taps: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three taps as two, for even and for odd places of the enlargement."""
    first, second, third = taps.split(1, axis)
    return torch.cat([first, second + third], axis), torch.cat([first + second, third], axis)


def _unfold(even: Tensor, odd: Tensor, axis: int) -> Tensor:
    (first, rest), (_, third) = even.split(1, axis), odd.split(1, axis)
    return torch.cat([first, rest - third, third], axis)


def upsample_residual(phases: Tensor, bias: Tensor, shortcut: Tensor, stride: int) -> Tensor:
    """The enlarged image that `phases` hold, plus bias, plus a shortcut enlarged by copying.

    Row 2i + a and column 2j + b of the result are row i + a and column j + b of phase (a, b). With
    r = 4·C·stride / C', channel c of frame t·stride + k gets the shortcut's frame t and channel
    (4·(c·stride + k) + 2a + b) div r. If the shortcut makes more frames, its first ones are left
    out. Computed in float32, or in float64 if the phases are.

    Args:
        phases: [B·F, 4·C, h + 1, w + 1], a convolution with `fold`'s weights and padding 1.
        bias: [C].
        shortcut: [B, C', T, h, w] with F ≤ T · stride.
        stride: frames that one of the shortcut's becomes.

    Returns:
        [B, C, F, 2h, 2w], channels last in memory.
    """
    wide = _wide(phases)
    (batch, width, frames, height, columns), channels = shortcut.shape, phases.shape[1] // 4
    apart = phases.to(wide).unflatten(1, (2, 2, channels)).unflatten(0, (batch, -1))
    corners = [
        [apart[:, :, a, b, :, a : a + height, b : b + columns] for b in range(2)] for a in range(2)
    ]
    rows = [torch.stack(pair, -1).flatten(-2) for pair in corners]
    image = torch.stack(rows, -2).flatten(-3, -2).transpose(1, 2)
    spread = shortcut.to(wide).repeat_interleave(4 * channels * stride // width, dim=1)
    spread = spread.view(batch, channels, stride, 2, 2, frames, height, columns)
    spread = spread.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(
        batch, channels, frames * stride, 2 * height, 2 * columns
    )
    result = image + bias.to(wide).view(-1, 1, 1, 1) + spread[:, :, -image.shape[2] :]
    return result.to(phases.dtype).contiguous(memory_format=torch.channels_last_3d)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
