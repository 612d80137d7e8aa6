"""Helpers of kernels in which each program works on one row.

A program holds its row as a tuple of pieces, whose widths are powers of two, as Triton has it. So
no lane of a row of 3072 idles, as would in one of 4096.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.triton_floats import magnitude_bits, reciprocal, round_e4m3

_MOST_PIECES = 8
_A_WARP = 1024
"""Elements that a warp holds, unless a kernel wants fewer."""


def rows_of(x: Tensor, width: int) -> Tensor:
    """A tensor as rows [R, width] of adjacent elements; a view where its strides allow one."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_options(width: int, a_warp: int = _A_WARP) -> dict[str, Any]:
    """Launch options of a kernel that holds a row of ``width`` elements in registers.

    Args:
        width: of a row.
        a_warp: how many elements a warp holds, as far as there are warps.

    Returns:
        PIECE, a power of two; PIECES, of which there are so many; and num_warps. Pieces are as wide
        as a row together, or a single one is wider.
    """
    piece = width & -width
    if width > _MOST_PIECES * piece:
        piece = triton.next_power_of_2(width)
    warps = triton.next_power_of_2(width) // a_warp
    return {"PIECE": piece, "PIECES": -(-width // piece), "num_warps": min(max(warps, 1), 16)}


def converts_e4m3(device: torch.device) -> bool:
    """Whether a device has the instruction that converts to E4M3: Ada and later GPUs have it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def load_row(x, start, width, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """``width`` elements from ``start`` on, as pieces of float32; 0 beyond ``width``."""
    pieces = ()
    for index in tl.static_range(PIECES):
        column = index * PIECE + tl.arange(0, PIECE)
        if PIECES > 1:
            values = tl.load(x + start + column)
        else:
            values = tl.load(x + start + column, mask=column < width, other=0.0)
        pieces += (values.to(tl.float32),)
    return pieces


@triton.jit
def store_piece(
    out, row, index: tl.constexpr, values, width, PIECE: tl.constexpr, PIECES: tl.constexpr
):
    """Store a piece of row ``row`` of ``width`` elements."""
    column = index * PIECE + tl.arange(0, PIECE)
    places = out + row.to(tl.int64) * width + column
    values = values.to(out.dtype.element_ty)
    if PIECES > 1:
        tl.store(places, values)
    else:
        tl.store(places, values, mask=column < width)


@triton.jit
def store_fp8_row(
    out, scales, row, pieces, width, PIECE: tl.constexpr, PIECES: tl.constexpr, NATIVE: tl.constexpr
):
    """Store a row, 0 beyond ``width``, as bytes of E4M3 and the row's scale.

    The formula is `lltk.ops.fp8_rows.fp8_quantise`. NaN counts as the largest of a row.
    """
    bits = magnitude_bits(pieces[0])
    for index in tl.static_range(1, PIECES):
        bits = tl.maximum(bits, magnitude_bits(pieces[index]))
    scale = tl.div_rn(tl.max(bits, 0).to(tl.float32, bitcast=True), 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scales + row, scale)
    factor = reciprocal(scale)
    for index in tl.static_range(PIECES):
        codes = e4m3_codes(pieces[index] * factor, NATIVE)
        store_piece(out, row, index, codes, width, PIECE, PIECES)


@triton.jit
def rounded(values, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """float32 rounded to a dtype and back.

    Args:
        NATIVE: whether the device has the instruction that rounds two numbers to bfloat16 at once.
            Left to the compiler, each would be rounded by itself, at a sixteenth of the rate.
    """
    if NATIVE and tl.bfloat16 == KIND:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 both;
            cvt.rn.bf16x2.f32 both, $3, $2;
            shl.b32 $0, both, 16;
            and.b32 $1, both, 0xffff0000;
            }
            """,
            "=r,=r,r,r",
            [values],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return values.to(KIND).to(tl.float32)


@triton.jit
def e4m3_codes(values, NATIVE: tl.constexpr):
    """Bytes of the nearest E4M3 values of float32, saturating at ±448."""
    if NATIVE:
        return values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
        codes = round_e4m3(tl.minimum(tl.abs(values), 448.0)) | sign
        return tl.where(values == values, codes, 0x7F).to(tl.uint8)
