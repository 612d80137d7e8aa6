"""Layer norm, modulation and quantisation without writing what lies between.

Both kernels norm: reading a row twice is cheaper than writing it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.floats import E4M3_MAX
from lltk.ops.hardware import has_e2m1
from lltk.ops.nvfp4_quantise.reference import BLOCK, FOUR_OVER_SIX_MAX, RULES, Quantised
from lltk.ops.nvfp4_quantise.triton import check_dtype, quantise_blocks, tensor_scales
from lltk.ops.triton_floats import is_finite

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "sums in another order; cvt.e2m1x2 where there is one and rounding is to nearest, else "
    "arithmetic",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)


def nvfp4_quantise_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, rule: str = "none"
) -> Quantised:
    """See `reference.nvfp4_quantise_norm`, from which it differs as their sums are rounded.

    Raises:
        ValueError: x is none of the dtypes that kernels read.
    """
    assert rule in RULES, rule
    check_dtype(x)
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    own = x.new_zeros((), dtype=torch.float32)
    decode_scale = torch.empty_like(own)
    codes = x.new_empty((*x.shape[:-1], width // 2), dtype=torch.uint8)
    scales = x.new_empty((*x.shape[:-1], width // BLOCK), dtype=torch.float8_e4m3fn)
    operands = (x, scale.contiguous(), shift.contiguous(), rows * width // scale.numel(), width)
    options = {"ROW": triton.next_power_of_2(width), "num_warps": 8, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        _largest[(rows,)](*operands, own.view(torch.int32), eps, **options)
        _quantise[(rows,)](
            *operands,
            codes,
            scales.view(torch.uint8),
            own,
            decode_scale,
            eps,
            TOP=E4M3_MAX if rule == "none" else FOUR_OVER_SIX_MAX,
            RULE=rule,
            NATIVE=has_e2m1(x.device),
            **options,
        )
    return Quantised(codes, scales, decode_scale)


@triton.jit
def _largest(x, scale, shift, together, width, largest, eps, ROW: tl.constexpr):
    values = _normed(x, scale, shift, tl.program_id(0), together, width, eps, ROW)
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(largest, tl.max(bits, 0))


@triton.jit
def _quantise(
    x,
    scale,
    shift,
    together,
    width,
    codes,
    scales,
    own,
    decode_scale,
    eps,
    ROW: tl.constexpr,
    TOP: tl.constexpr,
    RULE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    blocks: tl.constexpr = ROW // 16
    # Backwards: what the largest was looked for in last is still in the cache.
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    finite, largest, encode, decode = tensor_scales(own, decode_scale, tl.program_id(0) == 0, TOP)
    values = tl.reshape(_normed(x, scale, shift, row, together, width, eps, ROW), (1, blocks, 16))
    if not finite:
        values = tl.where(is_finite(values), values, 0.0)
    local = tl.arange(0, blocks)
    block = row.to(tl.int64) * (width // 16) + local
    scale_bytes, packed = quantise_blocks(
        values, block[None, :], largest, encode, decode, None, 0, TOP, RULE, NATIVE
    )
    inside = local < width // 16
    tl.store(scales + block, scale_bytes, mask=inside)
    packed = tl.reshape(packed, (blocks, 8))
    byte = tl.arange(0, 8)[None, :]
    tl.store(codes + block[:, None] * 8 + byte, packed, mask=inside[:, None])


@triton.jit
def _normed(x, scale, shift, row, together, width, eps, ROW: tl.constexpr):
    """A row's norm, scaled and shifted, rounded as x is; float32 [ROW], 0 beyond its end."""
    column = tl.arange(0, ROW)
    inside = column < width
    values = tl.load(x + row.to(tl.int64) * width + column, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(inside, values - tl.div_rn(tl.sum(values, 0), width.to(tl.float32)), 0.0)
    spread = tl.sqrt_rn(tl.div_rn(tl.sum(values * values, 0), width.to(tl.float32)) + eps)
    group = (row // together).to(tl.int64) * width + column
    values = tl.div_rn(values, spread) * tl.load(scale + group, mask=inside, other=0.0)
    values += tl.load(shift + group, mask=inside, other=0.0)
    return values.to(x.dtype.element_ty).to(tl.float32)
