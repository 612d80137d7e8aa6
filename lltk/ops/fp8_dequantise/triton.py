"""Rows in FP8, each read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.triton_floats import decode_e4m3

DECLARATION = Declaration(
    Exactness.BITWISE,
    "a block of elements a program",
    devices=("cuda",),
    modules=("triton",),
    opaque=True,
)
_BLOCK = 4096


def fp8_dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.fp8_dequantise`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    with torch.cuda.device_of(codes):
        _dequantise[(triton.cdiv(codes.numel(), _BLOCK),)](
            codes.contiguous().view(torch.uint8),
            scales.contiguous(),
            out,
            codes.numel(),
            codes.shape[-1],
            BLOCK=_BLOCK,
        )
    return out


@triton.jit
def _dequantise(codes, scales, out, count, width, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = index < count
    values = decode_e4m3(tl.load(codes + index, mask=held, other=0).to(tl.int32))
    values *= tl.load(scales + index // width, mask=held, other=0.0)
    tl.store(out + index, values.to(out.dtype.element_ty), mask=held)
