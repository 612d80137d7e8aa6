"""GELU and quantisation to FP8, each row read once and written once."""

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
    "a row a program; exponentials are approximated",
    devices=("cuda",),
    modules=("triton",),
    architectures=E4M3,
    opaque=True,
)


def fp8_quantise_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.fp8_quantise_gelu` to float32's rounding."""
    width = x.shape[-1]
    values, scales = new_fp8(x)
    rows = rows_of(x, width)
    with torch.cuda.device_of(x):
        _quantise_gelu[(rows.shape[0],)](
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
def _quantise_gelu(x, stride, width, out, scales, ROW: tl.constexpr, NATIVE: tl.constexpr):
    row = tl.program_id(0)
    values = load_row(x, row.to(tl.int64) * stride, width, ROW)
    # (1 + tanh(u)) / 2 = 1 / (1 + exp(−2u)), here as a power of 2; 2 √(2/π) log₂ e = 2.3022…
    power = values * (-2.302208198144325 - 0.10294324008002367 * values * values)
    values = values / (1.0 + tl.exp2(power))
    values = values.to(x.dtype.element_ty).to(tl.float32)
    store_fp8_row(out, scales, row, values, width, ROW, NATIVE)
