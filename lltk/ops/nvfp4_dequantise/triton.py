"""NVFP4 decoding as a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.triton_floats import decode_e2m1, decode_e4m3, unpack

DECLARATION = Declaration(
    Exactness.BITWISE,
    "decodes by arithmetic",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)

_AMOUNT = 256


def nvfp4_dequantise(
    codes: Tensor, scales: Tensor, decode_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `reference.nvfp4_dequantise`, which it equals bit by bit."""
    values = codes.new_empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=dtype)
    share = scales.numel() // decode_scale.numel()
    chunks = triton.cdiv(share, _AMOUNT)
    with torch.cuda.device_of(codes):
        _dequantise[(decode_scale.numel() * chunks,)](
            codes.contiguous(),
            scales.contiguous().view(torch.uint8),
            decode_scale.contiguous(),
            values,
            share,
            chunks,
            AMOUNT=_AMOUNT,
            enable_fp_fusion=False,
        )
    return values


@triton.jit
def _dequantise(codes, scales, decode_scale, values, share, chunks, AMOUNT: tl.constexpr):
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    local = chunk * AMOUNT + tl.arange(0, AMOUNT)
    block, inside = group.to(tl.int64) * share + local, local < share
    scale = decode_e4m3(tl.load(scales + block, mask=inside, other=0).to(tl.int32))
    packed = tl.load(
        codes + block[:, None] * 8 + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0
    )
    decoded = decode_e2m1(unpack(packed)) * scale[:, None] * tl.load(decode_scale + group)
    at = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(values + at, decoded.to(values.dtype.element_ty), mask=inside[:, None])
