"""Transposing, transforming and quantising without writing what lies between.

Both kernels transform: reading and adding up twice is cheaper than writing once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.floats import E4M3_MAX
from lltk.ops.hadamard.triton import sign_bits, transform
from lltk.ops.nvfp4_backends import has_e2m1
from lltk.ops.nvfp4_quantise.reference import BLOCK, FOUR_OVER_SIX_MAX, RULES, Quantised
from lltk.ops.nvfp4_quantise.triton import check_dtype, quantise_blocks, tensor_scales
from lltk.ops.nvfp4_quantise_transposed.reference import padded
from lltk.ops.triton_floats import is_finite

_ROWS, _COLUMNS = 64, 64


def nvfp4_quantise_transposed(
    x: Tensor,
    signs: list[int],
    rule: str = "none",
    seed: Tensor | None = None,
    stream: int = 0,
) -> Quantised:
    """See `reference.nvfp4_quantise_transposed`, which it equals bit by bit.

    Raises:
        ValueError: x is none of the dtypes that kernels read, or there are more than 64 signs.
    """
    assert rule in RULES, rule
    check_dtype(x)
    x = x.flatten(0, -2).contiguous()
    rows, columns = x.shape
    blocks = padded(rows, signs) // BLOCK
    own = x.new_zeros((), dtype=torch.float32)
    decode_scale = torch.empty_like(own)
    codes = x.new_empty((columns, blocks * BLOCK // 2), dtype=torch.uint8)
    scales = x.new_empty((columns, blocks), dtype=torch.float8_e4m3fn)
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(blocks * BLOCK, _ROWS))
    tile = {
        "TOP": torch.finfo(x.dtype).max,
        "STAGES": len(signs).bit_length() - 1,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        "enable_fp_fusion": False,
    }
    bits = sign_bits(signs)
    with torch.cuda.device_of(x):
        _largest[grid](x, own.view(torch.int32), bits, rows, columns, **tile)
        _quantise[grid](
            x,
            codes,
            scales.view(torch.uint8),
            own,
            decode_scale,
            bits,
            seed,
            stream,
            rows,
            columns,
            blocks,
            SCALE_TOP=E4M3_MAX if rule == "none" else FOUR_OVER_SIX_MAX,
            RULE=rule,
            NATIVE=has_e2m1(x.device),
            **tile,
        )
    return Quantised(codes, scales, decode_scale)


@triton.jit(do_not_specialize=["signs"])
def _largest(
    x,
    largest,
    signs,
    rows,
    columns,
    TOP: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    values = _turned(x, signs, rows, columns, TOP, STAGES, ROWS, COLUMNS)
    bits = tl.reshape(values, (ROWS * COLUMNS,)).to(tl.int32, bitcast=True)
    tl.atomic_max(largest, tl.max(bits & 0x7FFFFFFF, 0))


@triton.jit(do_not_specialize=["signs", "stream"])
def _quantise(
    x,
    codes,
    scales,
    own,
    decode_scale,
    signs,
    seed,
    stream,
    rows,
    columns,
    blocks,
    TOP: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE_TOP: tl.constexpr,
    RULE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    amount: tl.constexpr = COLUMNS * ROWS // 16
    stores = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    finite, largest, encode, decode = tensor_scales(own, own, decode_scale, stores, SCALE_TOP)
    values = _turned(x, signs, rows, columns, TOP, STAGES, ROWS, COLUMNS)
    values = tl.reshape(values, (1, amount, 16))
    if not finite:
        values = tl.where(is_finite(values), values, 0.0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    local = tl.program_id(1) * (ROWS // 16) + tl.arange(0, ROWS // 16)[None, :]
    block = tl.reshape(column.to(tl.int64) * blocks + local, (1, amount))
    inside = tl.reshape((column < columns) & (local < blocks), (1, amount))
    scale, packed = quantise_blocks(
        values, block, largest, encode, decode, seed, stream, SCALE_TOP, RULE, NATIVE
    )
    tl.store(scales + block, scale[None, :], mask=inside)
    byte = tl.arange(0, 8)[None, None, :]
    tl.store(codes + (block[:, :, None] * 8 + byte), packed, mask=inside[:, :, None])


@triton.jit
def _turned(
    x,
    signs,
    rows,
    columns,
    TOP: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """This program's tile of the transformed transpose, rounded as x is; float32 [C, R]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    values = tl.load(
        x + (row.to(tl.int64)[:, None] * columns + column[None, :]),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
        other=0.0,
    )
    values = tl.trans(values).to(tl.float32)
    if STAGES >= 0:
        values = tl.reshape(values, (COLUMNS * ROWS >> STAGES, 1 << STAGES))
        values = transform(values, signs, TOP, STAGES).to(x.dtype.element_ty).to(tl.float32)
    return tl.reshape(values, (COLUMNS, ROWS))
