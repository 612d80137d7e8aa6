"""Rotary tables from frame positions, as diffusers tabulates them."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, height: int, width: int, head_dim: int, theta: float
) -> tuple[Tensor, Tensor]:
    """Cos and sin of every token's angles.

    The head's D/2 complex pairs are split over time, height and width; height and width take
    ``head_dim // 6`` pairs each and time the rest. Pair j of an axis with n pairs turns by
    ``position * theta ** (-j / n)``. Angles, cos and sin are float64, then cast to float32, each
    value repeated for both halves of its pair (diffusers' WanRotaryPosEmbed).

    Args:
        positions: float64 [F], frame positions; they may be fractional and of any size.
        height, width: tokens of a frame.
        head_dim: D.
        theta: base of the frequencies.

    Returns:
        float32 [1, F * height * width, 1, D] cos, and sin.
    """
    frames = positions.shape[0]
    side = 2 * (head_dim // 6)
    grid = (frames, height, width)
    tables: list[tuple[Tensor, Tensor]] = []
    for axis, dim in enumerate((head_dim - 2 * side, side, side)):
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
        frequencies = 1.0 / (theta ** (steps / dim))
        where = (
            positions.to(torch.float64)
            if axis == 0
            else torch.arange(grid[axis], dtype=torch.float64, device=positions.device)
        )
        angles = torch.outer(where, frequencies)
        view = [1, 1, 1, dim]
        view[axis] = grid[axis]
        cos, sin = (
            f.repeat_interleave(2, dim=1).float().view(view).expand(*grid, dim)
            for f in (angles.cos(), angles.sin())
        )
        tables.append((cos, sin))
    tokens = frames * height * width
    cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*tables, strict=True))
    return cos.reshape(1, tokens, 1, head_dim), sin.reshape(1, tokens, 1, head_dim)
