"""Transposing tensors whose scales are shared by 16×16 tiles: no value changes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lltk.ops.floats import pack, unpack
from lltk.ops.nvfp4_quantise.reference import BLOCK


def nvfp4_transpose(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the transpose, its last axis padded to whole blocks.

    Args:
        codes: uint8 [R, K/2].
        scales: float8_e4m3fn [R, K/16], equal over the rows of a tile.

    Returns:
        uint8 [K, R/2] and float8_e4m3fn [K, R/16].
    """
    rows = pad(unpack(codes), (0, 0, 0, -codes.shape[0] % BLOCK))
    tiles = scales.view(torch.uint8)[::BLOCK].t()
    return (
        pack(rows.t()).contiguous(),
        tiles.repeat_interleave(BLOCK, dim=0).contiguous().view(torch.float8_e4m3fn),
    )
