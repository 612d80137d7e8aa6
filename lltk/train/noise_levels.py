"""The noise levels that a model trains on, and what each weighs in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 1000
"""The number of noise levels in the grid, and the timestep of pure noise."""
SHIFT = 5.0
"""How far the grid leans towards noise; Wan2.2's value."""

SCORE_BOUNDS = (20.0, 980.0)
"""The lowest and the highest timestep at which scores compare clips."""


def noise_grid(shift: float = SHIFT) -> Tensor:
    """Timesteps t = 1000·σ(1 − i/1000), i = 0 … 999, with σ(u) = shift·u / (1 + (shift − 1)·u).

    Returns:
        float32 [1000], falling from 1000; the last is above 0.
    """
    u = 1 - torch.arange(LEVELS, dtype=torch.float64) / LEVELS
    return (LEVELS * shift * u / (1 + (shift - 1) * u)).float()


def level_weights(grid: Tensor) -> Tensor:
    """A loss weight for each timestep of a grid: a bell about t = 500, of mean 1.

    The weight is w = 1000·(y − min y) / Σ(y − min y) with y(t) = exp(−2·((t − 500)/1000)²). It is 0
    at the lowest timestep.

    Returns:
        float32 [1000].
    """
    bell = torch.exp(-2 * ((grid.double() - LEVELS / 2) / LEVELS) ** 2)
    bell = bell - bell.min()
    return (LEVELS * bell / bell.sum()).float()


def score_levels(draws: Tensor, shift: float = SHIFT) -> tuple[Tensor, Tensor]:
    """The noise levels at which scores compare clips: t = 1000·σ(u/1000), from 20 to 980.

    Args:
        draws: u, whole numbers from 0 to 999, of any shape.
        shift: as `noise_grid`'s.

    Returns:
        Timesteps and noise levels, float32 of the draws' shape. A level is that of `noise_grid`
        whose timestep is nearest, as LongLive has it: 0.019685 at t = 20, and 0.979905 at 980.
    """
    grid = noise_grid(shift).flip(0)  # without 0, which is below the bounds
    lowest, highest = (int((grid - bound).abs().argmin()) + 1 for bound in SCORE_BOUNDS)
    timesteps = torch.cat([grid.new_zeros(1), grid])[draws].clamp(*SCORE_BOUNDS)
    return timesteps, torch.cat([grid.new_zeros(1), grid])[draws.clamp(lowest, highest)] / LEVELS
