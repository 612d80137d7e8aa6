"""Random Hadamard transform of blocks along the last axis."""

from __future__ import annotations

import torch
from torch import Tensor

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The signs of width 16 that every rank and run shares (TransformerEngine's)."""


def random_signs(width: int, seed: int) -> list[int]:
    """Signs for another width or draw."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, (width,), generator=generator)
    return [int(sign) for sign in 1 - 2 * drawn]


def hadamard(x: Tensor, signs: list[int]) -> Tensor:
    """x · diag(signs) · H / √n for each block of n along the last axis: orthogonal.

    Computed as √n · (H · (signs · x / n)), so that nothing overflows before the last product. Sums
    and differences are taken over pairs of elements whose indices differ in one bit, the lowest bit
    first.

    Args:
        x: [..., K], K a multiple of n, which is a power of two.
        signs: n times ±1.

    Returns:
        [..., K] in ``x``'s dtype, summed in float32. A result may be up to √n times the dtype's
        largest number, and saturates then. An infinity or NaN makes its whole block infinite or
        NaN.
    """
    width = len(signs)
    assert width.bit_count() == 1, f"{width} is no power of two"
    wide = torch.promote_types(x.dtype, torch.float32)
    blocks = x.to(wide).unflatten(-1, (-1, width))
    turned = blocks * (torch.tensor(signs, dtype=wide, device=x.device) / width)
    half = 1
    while half < width:
        first, second = turned.unflatten(-1, (-1, 2, half)).unbind(-2)
        turned = torch.stack([first + second, first - second], -2).flatten(-3)
        half *= 2
    turned = turned * width**0.5
    top = torch.finfo(x.dtype).max
    finite = blocks.isfinite().all(-1, keepdim=True)
    return torch.where(finite, turned.clamp(-top, top), turned).flatten(-2).to(x.dtype)
