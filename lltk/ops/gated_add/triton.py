"""A residual scaled by a gate and added, both read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.triton_rows import load_row, row_options, rows_of, store_row

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "a row a program; sum and product may be rounded at once",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """`reference.gated_add`; its sum and product may be rounded at once."""
    width = x.shape[-1]
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, y = rows_of(x, width), rows_of(y, width)
    gates = None if gate is None else rows_of(gate, width)
    with torch.cuda.device_of(x):
        _add[(rows.shape[0],)](
            rows,
            rows.stride(0),
            y,
            y.stride(0),
            gates,
            0 if gates is None else gates.stride(0),
            1 if gates is None else rows.shape[0] // gates.shape[0],
            width,
            total,
            **row_options(width),
        )
    return total


@triton.jit
def _add(x, x_stride, y, y_stride, gate, gate_stride, together, width, out, ROW: tl.constexpr):
    row = tl.program_id(0)
    if gate is not None:
        gate += (row // together).to(tl.int64) * gate_stride
    values = gated_sum(
        x + row.to(tl.int64) * x_stride, y + row.to(tl.int64) * y_stride, gate, width, ROW
    )
    store_row(out, row, values, width, ROW)


@triton.jit
def gated_sum(x, y, gate, width, ROW: tl.constexpr):
    """x + gate · y of a row each, rounded as x is; float32 [ROW], 0 beyond ``width``."""
    values, added = load_row(x, 0, width, ROW), load_row(y, 0, width, ROW)
    if gate is not None:
        added *= load_row(gate, 0, width, ROW)
    return (values + added).to(x.dtype.element_ty).to(tl.float32)
