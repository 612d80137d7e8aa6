"""Helpers of kernels in which each program works on one row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.triton_floats import magnitude_bits, reciprocal, round_e4m3


def rows_of(x: Tensor, width: int) -> Tensor:
    """A tensor as rows [R, width] of adjacent elements; a view where its strides allow one."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_options(width: int) -> dict[str, Any]:
    """Launch options of a kernel that holds a row of ``width`` elements in registers."""
    row = triton.next_power_of_2(width)
    return {"ROW": row, "num_warps": min(max(row // 512, 1), 16)}


def converts_e4m3(device: torch.device) -> bool:
    """Whether a device has the instruction that converts to E4M3: Ada and later GPUs have it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def load_row(x, start, width, ROW: tl.constexpr):
    """``width`` elements from ``start`` on, as float32 [ROW]; 0 beyond ``width``."""
    column = tl.arange(0, ROW)
    return tl.load(x + start + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def store_row(out, row, values, width, ROW: tl.constexpr):
    """Store [ROW] as row ``row`` of ``width`` elements."""
    column = tl.arange(0, ROW)
    start = row.to(tl.int64) * width
    tl.store(out + start + column, values.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def store_fp8_row(out, scales, row, values, width, ROW: tl.constexpr, NATIVE: tl.constexpr):
    """Store float32 [ROW], 0 beyond ``width``, as bytes of E4M3 and the row's scale.

    The formula is `lltk.ops.fp8_rows.fp8_quantise`. NaN counts as the largest of a row.
    """
    largest = tl.max(magnitude_bits(values), 0)
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scales + row, scale)
    codes = e4m3_codes(values * reciprocal(scale), NATIVE)
    store_row(out, row, codes, width, ROW)


@triton.jit
def e4m3_codes(values, NATIVE: tl.constexpr):
    """Bytes of the nearest E4M3 values of float32, saturating at ±448."""
    if NATIVE:
        return values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
        codes = round_e4m3(tl.minimum(tl.abs(values), 448.0)) | sign
        return tl.where(values == values, codes, 0x7F).to(tl.uint8)
