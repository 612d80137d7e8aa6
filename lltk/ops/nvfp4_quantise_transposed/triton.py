"""Transposing, transforming and quantising without writing what lies between.

Both kernels transform: reading and adding up twice is cheaper than writing once. Each row of a
transform is a tensor of its own, so that every sum is of a thread's own registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.floats import E4M3_MAX
from lltk.ops.hadamard.triton import sign_bits
from lltk.ops.hardware import has_e2m1
from lltk.ops.nvfp4_quantise.reference import BLOCK, FOUR_OVER_SIX_MAX, RULES, Quantised
from lltk.ops.nvfp4_quantise.triton import (
    check_dtype,
    quantise_blocks,
    store_blocks,
    tensor_scales,
)
from lltk.ops.nvfp4_quantise_transposed.op import new_transposed
from lltk.ops.triton_floats import is_finite, magnitude_bits

DECLARATION = Declaration(
    Exactness.BITWISE,
    "cvt.e2m1x2 where there is one and rounding is to nearest, else arithmetic",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)

_COLUMNS = 256


def nvfp4_quantise_transposed(
    x: Tensor,
    signs: list[int],
    rule: str = "none",
    seed: Tensor | None = None,
    stream: int = 0,
    largest: Tensor | None = None,
    run: int = 0,
) -> Quantised:
    """See the reference, which it equals bit by bit where no element exceeds ``largest``.

    Raises:
        ValueError: x is none of the dtypes that kernels read, or there are more than 64 signs.
    """
    assert rule in RULES, rule
    check_dtype(x)
    x = x.flatten(0, -2).contiguous()
    rows, columns = x.shape
    codes, scales, decode_scale = new_transposed(x, signs)
    own = torch.zeros_like(decode_scale) if largest is None else largest.contiguous()
    if largest is None:
        find_largest_transformed(x, signs, own)
    grid, tile = _division(x, signs)
    with torch.cuda.device_of(x):
        _quantise[grid](
            x,
            codes,
            scales.view(torch.uint8),
            own,
            decode_scale,
            sign_bits(signs),
            seed,
            stream,
            rows,
            columns,
            scales.shape[1],
            SCALE_TOP=E4M3_MAX if rule == "none" else FOUR_OVER_SIX_MAX,
            RULE=rule,
            RUN=run // BLOCK,
            NATIVE=has_e2m1(x.device),
            **tile,
        )
    return Quantised(codes, scales, decode_scale)


def find_largest_transformed(x: Tensor, signs: list[int], found: Tensor) -> None:
    """Raise a float32 [] to the transform's largest magnitude; x is [L, K] and contiguous."""
    grid, tile = _division(x, signs)
    with torch.cuda.device_of(x):
        _largest[grid](x, found.view(torch.int32), sign_bits(signs), *x.shape, **tile)


def _division(x: Tensor, signs: list[int]) -> tuple[tuple[int, int], dict[str, Any]]:
    """The kernels' grid over [L, K], and their constants."""
    rows, columns = x.shape
    together = max(BLOCK, len(signs))
    grid = (triton.cdiv(rows, together), triton.cdiv(columns, _COLUMNS))
    return grid, {
        "TOP": torch.finfo(x.dtype).max,
        "WIDTH": max(1, len(signs)),
        "ROWS": together,
        "COLUMNS": _COLUMNS,
        "enable_fp_fusion": False,
    }


@triton.jit(do_not_specialize=["signs"])
def _largest(
    x,
    largest,
    signs,
    rows,
    columns,
    TOP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    turned = _turned(x, signs, tl.program_id(0) * ROWS, column, rows, columns, TOP, WIDTH, ROWS)
    bits = tl.zeros((COLUMNS,), tl.int32)
    for index in tl.static_range(ROWS):
        bits = tl.maximum(bits, magnitude_bits(turned[index]))
    tl.atomic_max(largest, tl.max(bits, 0))


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
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE_TOP: tl.constexpr,
    RULE: tl.constexpr,
    RUN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    # Backwards: the elements that the first kernel read last are still in the cache.
    first = tl.num_programs(0) - 1 - tl.program_id(0)
    column = (tl.num_programs(1) - 1 - tl.program_id(1)) * COLUMNS + tl.arange(0, COLUMNS)
    stores = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    tensor = tensor_scales(own, decode_scale, stores, SCALE_TOP)
    turned = _turned(x, signs, first * ROWS, column, rows, columns, TOP, WIDTH, ROWS)
    for index in tl.static_range(ROWS // 16):
        values = tl.reshape(_joined(turned, 16 * index), (1, COLUMNS, 16))
        block = column.to(tl.int64) * blocks + first * (ROWS // 16) + index
        scale, packed = quantise_blocks(
            values, block[None, :], tensor, seed, stream, SCALE_TOP, RULE, NATIVE, RUN
        )
        store_blocks(codes, scales, block, scale, packed, column < columns)


@triton.jit
def _turned(
    x,
    signs,
    first,
    column,
    rows,
    columns,
    TOP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some columns of ROWS rows, transformed and rounded as x is: a float32 [C] for each row."""
    turned = ()
    for start in tl.static_range(0, ROWS, WIDTH):
        values = ()
        finite = column < columns
        for index in tl.static_range(WIDTH):
            row = first + start + index
            inside = (column < columns) & (row < rows)
            value = tl.load(x + (row.to(tl.int64) * columns + column), mask=inside, other=0.0)
            values = values + (value.to(tl.float32),)
            finite = finite & is_finite(values[index])
        if WIDTH > 1:
            values = _transformed(values, signs, WIDTH)
        for index in tl.static_range(WIDTH):
            value = values[index]
            if WIDTH > 1:
                value = tl.where(finite, tl.minimum(tl.maximum(value, -TOP), TOP), value)
            turned = turned + (value.to(x.dtype.element_ty).to(tl.float32),)
    return turned


@triton.jit
def _transformed(values, signs, WIDTH: tl.constexpr):
    """A tuple's transform, in the order of sums that `hadamard.reference.hadamard` has."""
    signed = ()
    for index in tl.static_range(WIDTH):
        negative = ((signs.to(tl.uint64) >> index) & 1) == 1
        signed = signed + (values[index] * tl.where(negative, -1.0 / WIDTH, 1.0 / WIDTH),)
    for stage in tl.static_range(6):
        if 1 << stage < WIDTH:
            sums = ()
            for index in tl.static_range(WIDTH):
                if index & (1 << stage):
                    sums = sums + (signed[index ^ (1 << stage)] - signed[index],)
                else:
                    sums = sums + (signed[index] + signed[index ^ (1 << stage)],)
            signed = sums
    scaled = ()
    for index in tl.static_range(WIDTH):
        scaled = scaled + (signed[index] * WIDTH**0.5,)
    return scaled


@triton.jit
def _joined(values, first: tl.constexpr):
    """Sixteen of a tuple's tensors [C], from one on, as [C, 16]."""
    joined = ()
    for index in tl.static_range(16):
        joined = joined + (values[first + index],)
    for stage in tl.static_range(4):
        halves = ()
        for index in tl.static_range(8 >> stage):
            halves = halves + (tl.join(joined[index], joined[index + (8 >> stage)]),)
        joined = halves
    return tl.reshape(joined[0], (joined[0].shape[0], 16))
