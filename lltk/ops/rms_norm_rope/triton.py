"""RMS norm over all heads, then rotary positions, each token read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.rms_norm_rope.op import new_heads
from lltk.ops.triton_rows import (
    converts_e4m3,
    e4m3_codes,
    load_row,
    rounded,
    row_options,
    rows_of,
    store_piece,
)

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "a token a program; sums in another order",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)


def rms_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, to: str = "plain"
) -> Tensor:
    """`reference.rms_norm_rope`, with sums taken in another order.

    Raises:
        ValueError: a head's width is no power of two.
    """
    out = new_heads(x, weight, cos, sin, eps, to)
    batch, length, heads, width = out.shape
    if width & (width - 1):
        raise ValueError(
            f"rms_norm_rope: triton is for heads of 16, 32, 64, …, not of {width}; set "
            "rms_norm_rope of the recipe's lower pass to torch"
        )
    rows, cos, sin = rows_of(x, heads * width), rows_of(cos, width), rows_of(sin, width)
    options = row_options(heads * width)
    with torch.cuda.device_of(x):
        _norm_rope[(batch * length,)](
            rows,
            rows.stride(0),
            weight.contiguous(),
            cos,
            cos.stride(0),
            sin,
            sin.stride(0),
            length,
            heads * width,
            eps,
            out.view(torch.uint8) if to == "e4m3" else out,
            WIDTH=width,
            NATIVE=converts_e4m3(x.device),
            **options,
        )
    return out


@triton.jit
def _norm_rope(
    x,
    x_stride,
    weight,
    cos,
    cos_stride,
    sin,
    sin_stride,
    length,
    width,
    eps,
    out,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    heads: tl.constexpr = PIECE // WIDTH
    row = tl.program_id(0)
    token = (row % length).to(tl.int64)
    pieces = load_row(x, row.to(tl.int64) * x_stride, width, PIECE, PIECES)
    # Read first, so that the sum does not wait for them.
    weights = load_row(weight, 0, width, PIECE, PIECES)
    pair = 2 * tl.arange(0, WIDTH // 2)[None, :]
    cosine = tl.load(cos + token * cos_stride + pair)
    sine = tl.load(sin + token * sin_stride + pair + 1)
    squares = pieces[0] * pieces[0]
    for index in tl.static_range(1, PIECES):
        squares += pieces[index] * pieces[index]
    factor = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    for index in tl.static_range(PIECES):
        values = rounded(pieces[index] * factor * weights[index], x.dtype.element_ty, NATIVE)
        even, odd = tl.split(tl.reshape(values, (heads, WIDTH // 2, 2)))
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        turned = tl.reshape(turned, (PIECE,))
        if out.dtype.element_ty == tl.uint8:
            turned = e4m3_codes(rounded(turned, x.dtype.element_ty, NATIVE), NATIVE)
        store_piece(out, row, index, turned, width, PIECE, PIECES)
