"""A block-scaled product as a kernel.

Where tensor cores know E2M1 it multiplies codes, elsewhere tiles decoded to bfloat16, which holds
them exactly. Sums are the tensor cores' float32, in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.nvfp4_backends import has_e2m1
from lltk.ops.triton_floats import decode_e2m1, decode_e4m3, unpack

# Smaller tiles of codes would be multiplied as bfloat16 without a word.
_TILE = {"ROWS": 128, "COLUMNS": 128}


def nvfp4_matmul(
    a_codes: Tensor,
    a_scales: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.nvfp4_matmul`, of which it may differ by what float32 sums round."""
    native = has_e2m1(a_codes.device)
    half, columns = b_codes.shape[1], b_codes.shape[0]
    rows = a_codes.numel() // half
    product = a_codes.new_empty((*a_codes.shape[:-1], columns), dtype=dtype)
    scale_dtype = torch.float8_e4m3fn if native else torch.uint8
    grid = (triton.cdiv(rows, _TILE["ROWS"]) * triton.cdiv(columns, _TILE["COLUMNS"]),)
    with torch.cuda.device_of(a_codes):
        _matmul[grid](
            a_codes.contiguous(),
            a_scales.contiguous().view(scale_dtype),
            a_scale,
            b_codes.contiguous(),
            b_scales.contiguous().view(scale_dtype),
            b_scale,
            product,
            rows,
            columns,
            half,
            **_TILE,
            WIDTH=256 if native else 64,
            NATIVE=native,
            num_warps=8,
            num_stages=3,
        )
    return product


@triton.jit
def _matmul(
    a_codes,
    a_scales,
    a_scale,
    b_codes,
    b_scales,
    b_scale,
    product,
    rows,
    columns,
    half,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    NATIVE: tl.constexpr,
):
    # Programs that run together share tiles of both operands.
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    i, j = tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, down, across, 8)
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for byte in range(0, half, WIDTH // 2):
        a, a_steps = _tile(a_codes, a_scales, row, rows, byte, half, WIDTH)
        b, b_steps = _tile(b_codes, b_scales, column, columns, byte, half, WIDTH)
        if NATIVE:
            total = tl.dot_scaled(a, a_steps, "e2m1", tl.trans(b), b_steps, "e2m1", total)
        else:
            total = tl.dot(_decode(a, a_steps), tl.trans(_decode(b, b_steps)), total)
    total = total * (tl.load(a_scale) * tl.load(b_scale))
    tl.store(
        product + row.to(tl.int64)[:, None] * columns + column[None, :],
        total.to(product.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


@triton.jit
def _tile(codes, scales, row, rows, byte, half, WIDTH: tl.constexpr):
    """Codes [R, WIDTH / 2] and scales [R, WIDTH / 16] from a byte of each row on."""
    at = byte + tl.arange(0, WIDTH // 2)
    step = byte // 8 + tl.arange(0, WIDTH // 16)
    first, inside = row.to(tl.int64)[:, None], (row < rows)[:, None]
    tile = tl.load(codes + first * half + at[None, :], mask=inside & (at < half)[None, :], other=0)
    steps = tl.load(
        scales + first * (half // 8) + step[None, :],
        mask=inside & (step < half // 8)[None, :],
        other=0.0,
    )
    return tile, steps


@triton.jit
def _decode(codes, steps):
    """bfloat16 [R, K] of codes and scales: exact."""
    rows: tl.constexpr = codes.shape[0]
    width: tl.constexpr = 2 * codes.shape[1]
    values = tl.reshape(decode_e2m1(unpack(codes)), (rows, width // 16, 16))
    values = values * decode_e4m3(steps.to(tl.int32))[:, :, None]
    return tl.reshape(values, (rows, width)).to(tl.bfloat16)
