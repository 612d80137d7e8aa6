"""Rotary tables from frame positions, as diffusers tabulates them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, height: int, width: int, split: Sequence[int], theta: float
) -> tuple[Tensor, Tensor]:
    """Cos and sin of every token's angles.

    A head's channels are complex pairs, which are split over time, height and width. Pair j of an
    axis with n pairs turns by ``position * theta ** (-j / n)``. Angles, cos and sin are float64,
    then cast to float32, each value repeated for both halves of its pair (diffusers'
    WanRotaryPosEmbed).

    Args:
        positions: float64 [F], frame positions; they may be fractional and of any size.
        height, width: tokens of a frame.
        split: channels that turn by time, by height and by width, each an even number; they sum
            to D, a head's width.
        theta: base of the frequencies.

    Returns:
        float32 [1, F * height * width, 1, D] cos, and sin.
    """
    frames = positions.shape[0]
    grid = (frames, height, width)
    tables: list[tuple[Tensor, Tensor]] = []
    for axis, dim in enumerate(split):
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
    return cos.reshape(1, tokens, 1, -1), sin.reshape(1, tokens, 1, -1)
