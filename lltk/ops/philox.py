"""Counter-based random numbers: Philox-4x32-10, the same on every device."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Four words a counter (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).

    Args:
        counter, key: int64 tensors of 32-bit words, shapes that broadcast.

    Returns:
        int64 [..., 4], each below 2**32.
    """
    a, b, c, d = torch.broadcast_tensors(*counter)
    low, high = key
    for _ in range(_ROUNDS):
        (first, second), (third, fourth) = (
            _product(_MULTIPLIERS[0], a),
            _product(_MULTIPLIERS[1], c),
        )
        a, b, c, d = third ^ b ^ low, fourth, first ^ d ^ high, second
        low, high = (low + _WEYL[0]) & _LOW, (high + _WEYL[1]) & _LOW
    return torch.stack([a, b, c, d], dim=-1)


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 64-bit product, summed from halves: int64 is signed."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(seed: Tensor, stream: int, shape: tuple[int, ...], run: int = 0) -> Tensor:
    """Uniform numbers on [0, 1), multiples of 2**-24.

    Element i (row-major) is word i % 4 of counter (i // 4 low, i // 4 high, draw, stream).

    The elements may be one rank's of a tensor that several ranks share, in runs of equal length.
    Each run of the shared tensor has the first rank's part, then the second's, and so on. An
    element's place is then its place in the shared tensor, and so its number is the same on any
    number of ranks.

    Args:
        seed: int64 [2]: the key, and which draw of it this is. Of a rank's part, int64 [4]: also
            the number of the rank, and how many ranks there are.
        stream: which of the draw's independent sequences, below 2**32.
        shape: of the result.
        run: how many elements of the part follow one another in the shared tensor, a multiple of
            4; 0 if no ranks share it.

    Returns:
        float32, on the seed's device.
    """
    size = prod(shape)
    block = torch.arange((size + 3) // 4, device=seed.device)
    if run:
        rank, ranks, blocks = seed[2], seed[3], run // 4
        block = (block // blocks * ranks + rank) * blocks + block % blocks
    key, draw = seed[0], seed[1]
    words = philox(
        (block & _LOW, block >> 32, draw & _LOW, torch.full_like(block, stream)),
        (key & _LOW, (key >> 32) & _LOW),
    )
    return ((words.flatten()[:size] >> 8).float() * 2.0**-24).view(shape)
