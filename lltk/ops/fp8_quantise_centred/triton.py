"""Attention's result in FP8, centred again and quantised, each row read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_rows import new_fp8
from lltk.ops.triton_floats import decode_e4m3, reciprocal
from lltk.ops.triton_rows import (
    converts_e4m3,
    load_row,
    rounded,
    row_options,
    store_fp8_row,
)

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "a row a program; multiplies by the scale's reciprocal",
    devices=("cuda",),
    modules=("triton",),
    opaque=True,
)

_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def fp8_quantise_centred(
    x: Tensor, scale: Tensor, centre: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`reference.fp8_quantise_centred`, but x is multiplied by 1 / scale, not divided by scale."""
    batch, tokens, heads, depth = x.shape
    width = heads * depth
    values, scales = new_fp8(x.flatten(2))
    with torch.cuda.device_of(x):
        _quantise_centred[(batch * tokens,)](
            x.contiguous().view(torch.uint8),
            scale,
            centre.contiguous(),
            tokens,
            width,
            values.view(torch.uint8),
            scales,
            KIND=_KINDS[dtype],
            NATIVE=converts_e4m3(x.device),
            **row_options(width),
        )
    return values, scales


@triton.jit
def _quantise_centred(
    x,
    scale,
    centre,
    tokens,
    width,
    out,
    scales,
    KIND: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    row = tl.program_id(0)
    centres = load_row(centre, (row // tokens).to(tl.int64) * width, width, PIECE, PIECES)
    factor = reciprocal(tl.load(scale))
    pieces = ()
    for index in tl.static_range(PIECES):
        column = index * PIECE + tl.arange(0, PIECE)
        places = x + row.to(tl.int64) * width + column
        codes = tl.load(places, mask=column < width, other=0)
        if NATIVE:
            values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            values = decode_e4m3(codes.to(tl.int32))
        pieces += (rounded(values * factor + centres[index], KIND, NATIVE),)
    store_fp8_row(out, scales, row, pieces, width, PIECE, PIECES, NATIVE)
