"""Layer norm, modulation and quantisation to FP8, each row read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import E4M3, Declaration, Exactness
from lltk.ops.fp8_quantise.op import new_fp8
from lltk.ops.triton_rows import converts_e4m3, load_row, row_options, rows_of, store_fp8_row

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "a row a program; sums in another order",
    devices=("cuda",),
    modules=("triton",),
    architectures=E4M3,
    opaque=True,
)


def fp8_quantise_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.fp8_quantise_norm`, but as sums are rounded."""
    width = x.shape[-1]
    values, scales = new_fp8(x)
    rows, scale, shift = (rows_of(t, width) for t in (x, scale, shift))
    with torch.cuda.device_of(x):
        _quantise_norm[(rows.shape[0],)](
            rows,
            rows.stride(0),
            scale,
            scale.stride(0),
            shift,
            shift.stride(0),
            rows.shape[0] // scale.shape[0],
            width,
            eps,
            values.view(torch.uint8),
            scales,
            NATIVE=converts_e4m3(x.device),
            **row_options(width),
        )
    return values, scales


@triton.jit
def _quantise_norm(
    x,
    x_stride,
    scale,
    scale_stride,
    shift,
    shift_stride,
    together,
    width,
    eps,
    out,
    scales,
    ROW: tl.constexpr,
    NATIVE: tl.constexpr,
):
    row = tl.program_id(0)
    group = (row // together).to(tl.int64)
    values = normed(
        load_row(x, row.to(tl.int64) * x_stride, width, ROW),
        scale + group * scale_stride,
        shift + group * shift_stride,
        width,
        eps,
        x.dtype.element_ty,
        ROW,
    )
    store_fp8_row(out, scales, row, values, width, ROW, NATIVE)


@triton.jit
def normed(values, scale, shift, width, eps, dtype: tl.constexpr, ROW: tl.constexpr):
    """The norm of float32 [ROW], scaled and shifted, rounded to ``dtype``; 0 beyond ``width``."""
    inside = tl.arange(0, ROW) < width
    # Read first, so that the sums do not wait for it.
    scale_row, shift_row = load_row(scale, 0, width, ROW), load_row(shift, 0, width, ROW)
    values = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    return (values * scale_row + shift_row).to(dtype).to(tl.float32)
