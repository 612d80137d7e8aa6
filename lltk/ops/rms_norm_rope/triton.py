"""RMS norm over all heads, then rotary positions, each token read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.rms_norm_rope.op import new_heads
from lltk.ops.triton_rows import row_options, rows_of

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "a token a program; sums in another order",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm_rope`, with sums taken in another order.

    Raises:
        ValueError: a head's width is no power of two.
    """
    out = new_heads(x, weight, cos, sin, eps)
    batch, length, heads, width = out.shape
    if width & (width - 1):
        raise ValueError(
            f"rms_norm_rope: triton is for heads of 16, 32, 64, …, not of {width}; set "
            "rms_norm_rope of the recipe's lower pass to torch"
        )
    rows, cos, sin = rows_of(x, heads * width), rows_of(cos, width), rows_of(sin, width)
    padded = triton.next_power_of_2(heads)
    with torch.cuda.device_of(x):
        _norm_rope[(batch * length,)](
            rows,
            rows.stride(0),
            weight.contiguous(),
            cos,
            cos.stride(0),
            sin,
            sin.stride(0),
            length,
            heads,
            eps,
            out,
            HEADS=padded,
            WIDTH=width,
            num_warps=row_options(padded * width)["num_warps"],
        )
    return out


@triton.jit
def _norm_rope(
    x,
    x_stride,
    weight,
    cos,
    cos_stride,
    sin,
    sin_stride,
    length,
    heads,
    eps,
    out,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    token = (row % length).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    inside = head < heads
    place = head * WIDTH + tl.arange(0, WIDTH)[None, :]
    values = tl.load(x + row.to(tl.int64) * x_stride + place, mask=inside, other=0.0)
    # Read first, so that the sum does not wait for them.
    weights = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    pair = 2 * tl.arange(0, WIDTH // 2)[None, :]
    cosine = tl.load(cos + token * cos_stride + pair)
    sine = tl.load(sin + token * sin_stride + pair + 1)
    values = values.to(tl.float32)
    mean = tl.sum(values * values) / (heads * WIDTH)
    values = values * tl.rsqrt(mean + eps) * weights
    values = values.to(x.dtype.element_ty).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (HEADS, WIDTH // 2, 2)))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    turned = tl.reshape(turned, (HEADS, WIDTH)).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * heads * WIDTH + place, turned, mask=inside)
