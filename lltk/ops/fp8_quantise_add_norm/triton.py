"""A gated residual, layer norm, modulation and quantisation to FP8, without reading the sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import E4M3, Declaration, Exactness
from lltk.ops.fp8_quantise.op import new_fp8
from lltk.ops.fp8_quantise_norm.triton import normed
from lltk.ops.gated_add.triton import gated_sum
from lltk.ops.triton_rows import converts_e4m3, row_options, rows_of, store_fp8_row, store_row

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "a row a program; sums in another order",
    devices=("cuda",),
    modules=("triton",),
    architectures=E4M3,
    opaque=True,
)


def fp8_quantise_add_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.fp8_quantise_add_norm`, as near as `gated_add` and `fp8_quantise_norm` are."""
    width = x.shape[-1]
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values, scales = new_fp8(x)
    rows, y, scale, shift = (rows_of(t, width) for t in (x, y, scale, shift))
    gates = None if gate is None else rows_of(gate, width)
    with torch.cuda.device_of(x):
        _add_norm[(rows.shape[0],)](
            rows,
            rows.stride(0),
            y,
            y.stride(0),
            gates,
            0 if gates is None else gates.stride(0),
            1 if gates is None else rows.shape[0] // gates.shape[0],
            scale,
            scale.stride(0),
            shift,
            shift.stride(0),
            rows.shape[0] // scale.shape[0],
            width,
            eps,
            total,
            values.view(torch.uint8),
            scales,
            NATIVE=converts_e4m3(x.device),
            **row_options(width),
        )
    return total, values, scales


@triton.jit
def _add_norm(
    x,
    x_stride,
    y,
    y_stride,
    gate,
    gate_stride,
    gate_together,
    scale,
    scale_stride,
    shift,
    shift_stride,
    together,
    width,
    eps,
    total,
    out,
    scales,
    ROW: tl.constexpr,
    NATIVE: tl.constexpr,
):
    row = tl.program_id(0)
    group = (row // together).to(tl.int64)
    if gate is not None:
        gate += (row // gate_together).to(tl.int64) * gate_stride
    values = gated_sum(
        x + row.to(tl.int64) * x_stride, y + row.to(tl.int64) * y_stride, gate, width, ROW
    )
    store_row(total, row, values, width, ROW)
    values = normed(
        values,
        scale + group * scale_stride,
        shift + group * shift_stride,
        width,
        eps,
        x.dtype.element_ty,
        ROW,
    )
    store_fp8_row(out, scales, row, values, width, ROW, NATIVE)
