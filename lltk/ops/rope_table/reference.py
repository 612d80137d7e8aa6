"""Rotary tables from frame positions, as diffusers tabulates them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

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
    numbers = partial(torch.arange, dtype=torch.float64, device=positions.device)
    places = (positions.to(torch.float64), numbers(height), numbers(width))
    grid = [len(place) for place in places]
    tables: list[list[Tensor]] = []
    for axis, (place, dim) in enumerate(zip(places, split, strict=True)):
        angles = torch.outer(place, 1.0 / (theta ** (numbers(0, dim, 2) / dim)))
        view = [-1 if other == axis else 1 for other in range(3)]
        tables.append(
            [
                f.repeat_interleave(2, dim=1).float().view(*view, dim).expand(*grid, dim)
                for f in (angles.cos(), angles.sin())
            ]
        )
    cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*tables, strict=True))
    return cos.reshape(1, prod(grid), 1, -1), sin.reshape(1, prod(grid), 1, -1)
