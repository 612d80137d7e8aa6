"""Where block-scaled GEMMs want the scales: 128×4 tiles of 512 bytes (torch's SWIZZLE_32_4_4)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

_ROWS, _COLUMNS = 128, 4


def swizzle(scales: Tensor) -> Tensor:
    """Scales in a GEMM's layout, padded with zeros to whole tiles.

    Scale (r, c) of C padded columns lies at
    ((r // 128)·(C / 4) + c // 4)·512 + (r % 32)·16 + (r % 128 // 32)·4 + c % 4.

    Args:
        scales: uint8 [R, C].

    Returns:
        uint8 [⌈R/128⌉ · ⌈C/4⌉ · 512].
    """
    rows, columns = scales.shape
    padded = pad(scales, (0, -columns % _COLUMNS, 0, -rows % _ROWS))
    tiles = padded.view(padded.shape[0] // _ROWS, 4, 32, padded.shape[1] // _COLUMNS, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).flatten()


def unswizzle(flat: Tensor, rows: int, columns: int) -> Tensor:
    """`swizzle`'s inverse: uint8 [rows, columns]."""
    down, across = -(-rows // _ROWS), -(-columns // _COLUMNS)
    tiles = flat.view(down, across, 32, 4, _COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * _ROWS, across * _COLUMNS)[:rows, :columns].contiguous()
