"""Transposing codes as a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.nvfp4_transpose.op import new_transpose
from lltk.ops.triton_floats import unpack

DECLARATION = Declaration(
    Exactness.BITWISE,
    "moves codes and scales",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)

_ROWS, _COLUMNS = 64, 64


def nvfp4_transpose(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.nvfp4_transpose`, which it equals bit by bit."""
    rows, width = codes.shape[0], 2 * codes.shape[1]
    turned, turned_scales = new_transpose(codes, scales)
    with torch.cuda.device_of(codes):
        _transpose[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))](
            codes.contiguous(),
            scales.contiguous().view(torch.uint8),
            turned,
            turned_scales.view(torch.uint8),
            rows,
            width,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return turned, turned_scales


@triton.jit
def _transpose(
    codes, scales, turned, turned_scales, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    packed = tl.load(
        codes + row[:, None] * (width // 2) + byte[None, :],
        mask=(row < rows)[:, None] & (byte < width // 2)[None, :],
        other=0,
    )
    even, odd = tl.split(tl.reshape(tl.trans(unpack(packed)), (COLUMNS, ROWS // 2, 2)))
    blocks = tl.cdiv(rows, 16)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    half = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    tl.store(
        turned + column[:, None] * (blocks * 8) + half[None, :],
        (even | odd << 4).to(tl.uint8),
        mask=(column < width)[:, None] & (half < blocks * 8)[None, :],
    )
    block = tl.program_id(0) * (ROWS // 16) + tl.arange(0, ROWS // 16)
    inside = (column < width)[:, None] & (block < blocks)[None, :]
    first = block.to(tl.int64) * 16 * (width // 16)
    scale = tl.load(scales + first[None, :] + (column // 16)[:, None], mask=inside)
    tl.store(turned_scales + column[:, None] * blocks + block[None, :], scale, mask=inside)
