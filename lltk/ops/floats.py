"""E2M1 and E4M3, the two element types of NVFP4, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by the low three bits of a code; bit 3 is the sign."""
E2M1_MAX = 6.0
E4M3_MAX = 448.0


def round_e4m3(values: Tensor) -> Tensor:
    """Nearest E4M3 values, ties to even, saturating at ±448; NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def reciprocal(scales: Tensor) -> Tensor:
    """1 / scale, at most float32's largest."""
    return scales.reciprocal().clamp(max=torch.finfo(torch.float32).max)


def round_e2m1(values: Tensor) -> Tensor:
    """Nearest E2M1 codes, ties to even, saturating at ±6.

    Args:
        values: float32, of any shape; NaN becomes 0.

    Returns:
        uint8, a code each.
    """
    size = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    # A tie goes to the even code: up at .75, 1.75 and 3.5, down at .25, 1.25, 2.5 and 5.
    for border, upwards in zip((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), (0, 1) * 4, strict=False):
        code += (size >= border) if upwards else (size > border)
    return code | (values.signbit().to(torch.uint8) << 3)


def round_e2m1_randomly(values: Tensor, random: Tensor) -> Tensor:
    """E2M1 codes of one of the two neighbours, so that the mean over ``random`` is the value.

    Args:
        values: float32 within ±6.
        random: float32 in [0, 1), of the same shape. The neighbour further from 0 is taken where
            random · gap is less than the distance from the other neighbour, with gap the distance
            between both. For example 2.25 becomes 3 where random is below 0.25, and else 2.

    Returns:
        uint8, a code each.
    """
    size = values.abs()
    grid = torch.tensor(E2M1, device=values.device)
    code = torch.zeros_like(values, dtype=torch.uint8)
    for border in E2M1[1:]:
        code += size >= border
    lower = grid[code.long()]
    gap = grid[(code.long() + 1).clamp(max=7)] - lower
    code += (gap > 0) & (random * gap < size - lower)
    return code | (values.signbit().to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Values of E2M1 codes, float32."""
    signed = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return signed[codes.long()]


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte along the last axis, the even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """One code an element, `pack`'s inverse."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def round_e4m3_up(values: Tensor) -> Tensor:
    """The least E4M3 value not below each; 448 for larger ones. Values are not negative."""
    nearest = round_e4m3(values)
    short = (nearest.float() < values) & (nearest.float() < E4M3_MAX)
    return (nearest.view(torch.uint8) + short.to(torch.uint8)).view(torch.float8_e4m3fn)
