"""Rows in FP8, each read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import E4M3, Declaration, Exactness
from lltk.ops.fp8_quantise.op import new_fp8
from lltk.ops.triton_rows import converts_e4m3, load_row, row_options, rows_of, store_fp8_row

DECLARATION = Declaration(
    Exactness.BITWISE,
    "a row a program",
    devices=("cuda",),
    modules=("triton",),
    architectures=E4M3,
    opaque=True,
)


def fp8_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.fp8_quantise`."""
    width = x.shape[-1]
    values, scales = new_fp8(x)
    rows = rows_of(x, width)
    with torch.cuda.device_of(x):
        _quantise[(rows.shape[0],)](
            rows,
            rows.stride(0),
            width,
            values.view(torch.uint8),
            scales,
            NATIVE=converts_e4m3(x.device),
            **row_options(width),
        )
    return values, scales


@triton.jit
def _quantise(x, stride, width, out, scales, ROW: tl.constexpr, NATIVE: tl.constexpr):
    row = tl.program_id(0)
    values = load_row(x, row.to(tl.int64) * stride, width, ROW)
    store_fp8_row(out, scales, row, values, width, ROW, NATIVE)
