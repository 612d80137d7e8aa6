"""The noise levels that a model trains on, and what each weighs in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 1000
"""The number of noise levels in the grid, and the timestep of pure noise."""
SHIFT = 5.0
"""How far the grid leans towards noise; Wan2.2's value."""


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
