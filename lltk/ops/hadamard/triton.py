"""The random Hadamard transform as a kernel of butterflies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.nvfp4_quantise.triton import check_dtype
from lltk.ops.triton_floats import is_finite

DECLARATION = Declaration(
    Exactness.BITWISE,
    "butterflies in the reference's order",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)

_ELEMENTS = 4096


def hadamard(x: Tensor, signs: list[int]) -> Tensor:
    """See `reference.hadamard`, which it equals bit by bit.

    Raises:
        ValueError: x is none of the dtypes that kernels read, or there are more than 64 signs.
    """
    check_dtype(x)
    x = x.contiguous()
    turned = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _hadamard[(triton.cdiv(x.numel(), _ELEMENTS),)](
            x,
            turned,
            sign_bits(signs),
            x.numel(),
            TOP=torch.finfo(x.dtype).max,
            STAGES=len(signs).bit_length() - 1,
            ELEMENTS=_ELEMENTS,
            enable_fp_fusion=False,
        )
    return turned


def sign_bits(signs: list[int]) -> int:
    """The signs as one number for kernels: bit i is set if sign i is negative.

    A list would have to be copied to the device, and the host would wait for the copy.
    """
    if len(signs) > 64:
        raise ValueError(f"hadamard: triton has widths up to 64, not {len(signs)}")
    return sum(1 << index for index, sign in enumerate(signs) if sign < 0)


@triton.jit(do_not_specialize=["signs"])
def _hadamard(
    x,
    turned,
    signs,
    numel,
    TOP: tl.constexpr,
    STAGES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    values = tl.load(x + at, mask=at < numel, other=0.0).to(tl.float32)
    values = transform(tl.reshape(values, (ELEMENTS >> STAGES, 1 << STAGES)), signs, TOP, STAGES)
    values = tl.reshape(values, (ELEMENTS,)).to(x.dtype.element_ty)
    tl.store(turned + at, values, mask=at < numel)


@triton.jit
def transform(values, signs, TOP: tl.constexpr, STAGES: tl.constexpr):
    """Rows of float32 [N, W] transformed. Rows without infinity or NaN saturate at ±TOP."""
    amount: tl.constexpr = values.shape[0]
    width: tl.constexpr = values.shape[1]
    finite = tl.min(is_finite(values).to(tl.int32), 1)[:, None] == 1
    negative = (signs.to(tl.uint64) >> tl.arange(0, width).to(tl.uint64)) & 1
    turned = values * tl.where(negative == 1, -1.0 / width, 1.0 / width)[None, :]
    lower = tl.arange(0, 2)[None, :, None] == 0
    for stage in tl.static_range(STAGES):
        pair = tl.reshape(turned, (amount * width >> (stage + 1), 2, 1 << stage))
        # Of two numbers, whose sum is the same in either order.
        first, second = tl.sum(pair, 1), tl.sum(pair * tl.where(lower, 1.0, -1.0), 1)
        pair = tl.where(lower, first[:, None, :], second[:, None, :])
        turned = tl.reshape(pair, (amount, width))
    turned = turned * width**0.5
    return tl.where(finite, tl.minimum(tl.maximum(turned, -TOP), TOP), turned)
