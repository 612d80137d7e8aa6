"""A block-scaled product, by a kernel where tensor cores know E2M1.

Elsewhere operands are decoded to bfloat16, which holds codes and block scales exactly, and torch
multiplies. Decoding an operand once is faster than decoding each tile wherever it is used. Sums are
float32, in the order of the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.hardware import E2M1_PRODUCTS, has_e2m1
from lltk.ops.nvfp4_dequantise.triton import nvfp4_dequantise

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "NVFP4 tensor cores on sm_100, sm_103, sm_110 and sm_120; elsewhere operands are decoded "
    "to bfloat16, exactly, for bfloat16 ones",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)

# Blackwell's tensor cores multiply codes of no fewer than 128 rows.
_TILE = {"ROWS": 128, "COLUMNS": 128, "WIDTH": 256}

Operand = tuple[Tensor, Tensor, Tensor]
"""Codes [L, K/2], scales [L, K/16] and decode scale."""


def nvfp4_matmul(
    a_codes: Tensor,
    a_scales: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.nvfp4_matmul`, but float32 sums may be rounded in another order."""
    multiply = _coded if has_e2m1(a_codes.device, E2M1_PRODUCTS) else _decoded
    a = (a_codes.flatten(0, -2), a_scales.flatten(0, -2), a_scale)
    product = multiply(a, (b_codes, b_scales, b_scale), dtype)
    return product.unflatten(0, a_codes.shape[:-1])


def _decoded(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    one = torch.ones_like(a[2])
    left, right = (nvfp4_dequantise(*operand[:2], one, torch.bfloat16) for operand in (a, b))
    sums = torch.mm(left, right.t(), out_dtype=torch.float32)
    return torch.mul(sums, a[2] * b[2], out=torch.empty_like(sums, dtype=dtype))


def _coded(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    rows, columns = len(a[0]), len(b[0])
    product = a[0].new_empty((rows, columns), dtype=dtype)
    grid = (triton.cdiv(rows, _TILE["ROWS"]) * triton.cdiv(columns, _TILE["COLUMNS"]),)
    with torch.cuda.device_of(product):
        _matmul[grid](
            a[0].contiguous(),
            a[1].contiguous(),
            a[2],
            b[0].contiguous(),
            b[1].contiguous(),
            b[2],
            product,
            rows,
            columns,
            b[0].shape[1],
            **_TILE,
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
        total = tl.dot_scaled(a, a_steps, "e2m1", tl.trans(b), b_steps, "e2m1", total)
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
