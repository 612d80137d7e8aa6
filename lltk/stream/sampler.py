"""The sampler: UniPC for flow models.

A step is a linear combination of tensors. Its coefficients follow from the schedule alone, so they
are computed before the first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_SIGMA = 0.999
"""Where the base sigmas start, before the shift."""
TRAIN_STEPS = 1000
"""A model's timestep is this times sigma, rounded down."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels and solver coefficients of an N-step run, for any number of samplers.

    A flow model at noise level s sees ``x = (1 - s) x0 + s noise`` and returns the velocity
    ``v = noise - x0``, so it predicts ``m = x - s v``.

    Attributes:
        sigmas: the N noise levels, falling, and then 0.
        timesteps: what the model is told at each.
        table: float32 [N, 9] on the samplers' device; a row holds the timestep, sigma, the
            corrector's four coefficients and the predictor's three (see `Sampler`).
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[int, ...]
    table: Tensor

    @classmethod
    def make(cls, steps: int, shift: float = 5.0, device: torch.device | str = "cpu") -> Schedule:
        """The schedule that LongLive's few-step models are distilled with.

        N + 1 base sigmas fall evenly from 0.999 to 0, and each becomes
        ``shift s / (1 + (shift - 1) s)``. Coefficients are computed in float64.

        Args:
            steps: N, denoising passes.
            shift: above 1 for more time at high noise.
            device: where the samplers' latents are.

        Raises:
            ValueError: fewer steps than one, or a shift that is not positive.
        """
        if steps < 1:
            raise ValueError(f"sampler: steps={steps}: at least one denoising pass is needed")
        if not 0 < shift < math.inf:
            raise ValueError(f"sampler: shift={shift}: must be positive (1 for no shift)")
        base = [FIRST_SIGMA * (steps - i) / steps for i in range(steps + 1)]
        sigmas = tuple(shift * s / (1 + (shift - 1) * s) for s in base)
        timesteps = tuple(int(TRAIN_STEPS * s) for s in sigmas[:-1])
        rows = [
            (timesteps[i], sigmas[i], *_corrector(sigmas, i), *_predictor(sigmas, i))
            for i in range(steps)
        ]
        return cls(sigmas, timesteps, torch.tensor(rows, dtype=torch.float32, device=device))

    @property
    def steps(self) -> int:
        """N, denoising passes."""
        return len(self.timesteps)


class Sampler:
    """One run from noise to clean latents: flow UniPC of order 2 (B₂, predicting x0).

    With the prediction m_i at step i, ::

        y_i     = c0 y_(i-1) + c1 m_(i-2) + c2 m_(i-1) + c3 m_i    (corrector; y_0 = noise)
        x_(i+1) = p0 y_i + p1 m_(i-1) + p2 m_i                     (predictor)

    The first and the last step are of order 1. The state is float32. A step reads nothing back to
    the host and mutates no tensor; it is differentiable in the noise and the model's outputs. A
    step is elementwise, so a caller may show the model other values in some frames, and the
    sampler's other frames do not change by that.

    Args:
        schedule: on the noise's device.
        noise: [B, C, F, h, w], unit variance.
    """

    def __init__(self, schedule: Schedule, noise: Tensor) -> None:
        self._schedule = schedule
        self._next = 0
        self._latents = self._corrected = noise.to(torch.float32)
        self._clean = self._clean_before = torch.zeros_like(self._latents)

    @property
    def latents(self) -> Tensor:
        """What the model sees next: float32, of the noise's shape."""
        return self._latents

    @property
    def result(self) -> Tensor:
        """The last step's prediction of the clean latents; after step N - 1, the run's output."""
        if self._next == 0:
            raise ValueError("sampler: there is no result before the first step")
        return self._clean

    def timestep(self, index: int) -> Tensor:
        """What the model is told at step ``index``: float32 [], on the schedule's device."""
        return self._schedule.table[index, 0]

    def step(self, index: int, model_output: Tensor) -> Tensor:
        """Take the model's velocity at `latents` and `timestep(index)`.

        Args:
            index: 0, 1, … N - 1 in turn.
            model_output: of the noise's shape, any floating dtype.

        Returns:
            The next `latents`.

        Raises:
            ValueError: a step out of order, or beyond the last.
        """
        if index != self._next or index >= self._schedule.steps:
            expected = f"expected {self._next}" if self._next < self._schedule.steps else "all done"
            raise ValueError(
                f"sampler: step {index} of {self._schedule.steps} out of order, {expected}; "
                "make a new sampler for a new chunk"
            )
        assert model_output.shape == self._latents.shape
        _, sigma, c0, c1, c2, c3, p0, p1, p2 = self._schedule.table[index].unbind()
        before, last = self._clean_before, self._clean
        clean = self._latents - sigma * model_output.to(torch.float32)
        self._corrected = c0 * self._corrected + c1 * before + c2 * last + c3 * clean
        self._latents = p0 * self._corrected + p1 * last + p2 * clean
        self._clean_before, self._clean = last, clean
        self._next += 1
        return self._latents


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, ``u + scale (c - u)``: float32, of the inputs' shape."""
    unconditional = unconditional.to(torch.float32)
    return unconditional + scale * (conditional.to(torch.float32) - unconditional)


# UniPC's coefficients (Zhao et al., 2023, arXiv:2302.04867), with alpha = 1 - sigma


def _order(sigmas: tuple[float, ...], i: int) -> int:
    """Order of the predictor at step i: 1 at the first step and the last, else 2."""
    return 1 if i == 0 or i == len(sigmas) - 2 else 2


def _half_log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma else math.inf


def _span(sigmas: tuple[float, ...], i: int) -> tuple[float, float, float]:
    """The step from sigma i to the next.

    Returns:
        The sigmas' ratio, the weight of the predictions, and h, by which half the log-SNR grows.
    """
    here, there = sigmas[i], sigmas[i + 1]
    h = _half_log_snr(there) - _half_log_snr(here)
    return there / here, -(1 - there) * math.expm1(-h), h


def _predictor(sigmas: tuple[float, ...], i: int) -> tuple[float, float, float]:
    """Coefficients of (y_i, m_(i-1), m_i) in x_(i+1)."""
    ratio, weight, h = _span(sigmas, i)
    if _order(sigmas, i) == 1:
        return ratio, 0.0, weight
    r = -_span(sigmas, i - 1)[2] / h
    return ratio, weight * 0.5 / r, weight * (1 - 0.5 / r)


def _corrector(sigmas: tuple[float, ...], i: int) -> tuple[float, float, float, float]:
    """Coefficients of (y_(i-1), m_(i-2), m_(i-1), m_i) in y_i.

    The corrector takes step i - 1 once more, now with the prediction at its end.
    """
    if i == 0:
        return 1.0, 0.0, 0.0, 0.0
    ratio, weight, h = _span(sigmas, i - 1)
    if _order(sigmas, i - 1) == 1:
        return ratio, 0.0, 0.5 * weight, 0.5 * weight
    r = -_span(sigmas, i - 2)[2] / h
    # [[1, 1], [r, 1]] (a, b) = (phi_2, 2 phi_3) / phi_1, with phi_k at -h
    phi_1 = math.expm1(-h) / -h
    phi_2 = (phi_1 - 1) / -h
    phi_3 = (phi_2 - 0.5) / -h
    a = (phi_2 - 2 * phi_3) / phi_1 / (1 - r)
    b = phi_2 / phi_1 - a
    return ratio, weight * a / r, weight * (1 - a / r - b), weight * b
