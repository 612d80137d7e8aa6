"""Rows in FP8, each read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.triton_floats import decode_e4m3

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "a block of elements a program; product and sum may be rounded once",
    devices=("cuda",),
    modules=("triton",),
    opaque=True,
)
_BLOCK = 4096


def fp8_dequantise(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, centre: Tensor | None = None
) -> Tensor:
    """`reference.fp8_dequantise`; without a centre, bit for bit."""
    _, length, heads, width = codes.shape
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    with torch.cuda.device_of(codes):
        _dequantise[(triton.cdiv(codes.numel(), _BLOCK),)](
            codes.contiguous().view(torch.uint8),
            scales.contiguous(),
            None if centre is None else centre.contiguous(),
            out,
            codes.numel(),
            width if scales.dim() else codes.numel(),
            length,
            heads * width,
            BLOCK=_BLOCK,
        )
    return out


@triton.jit
def _dequantise(codes, scales, centre, out, count, together, length, token, BLOCK: tl.constexpr):
    """``together`` elements share a scale, and ``token`` elements are one token's."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = index < count
    values = decode_e4m3(tl.load(codes + index, mask=held, other=0).to(tl.int32))
    values *= tl.load(scales + index // together, mask=held, other=0.0)
    if centre is not None:
        own = index // token // length * token + index % token
        values += tl.load(centre + own, mask=held, other=0.0)
    tl.store(out + index, values.to(out.dtype.element_ty), mask=held)
