"""The product of torch's scaled matrix multiplication, a scale for each row of both operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lltk.ops.declaration import E4M3, Declaration, Exactness

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "summed as tensor cores do, rounded to bfloat16",
    devices=("cuda",),
    architectures=E4M3,
)

_MULTIPLE = 16
"""What K and N must be a multiple of."""


def fp8_matmul(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.fp8_matmul`, summed as tensor cores do and rounded to bfloat16 first.

    K and N are padded with zeros to multiples of 16.
    """
    columns, width = b.shape
    missing = -columns % _MULTIPLE
    a, b = _padded(a.flatten(0, -2), 0, -width % _MULTIPLE), _padded(b, missing, -width % _MULTIPLE)
    if bias is not None:
        bias = _pad(bias.bfloat16(), (0, missing))
    # The public scaled_mm breaks graphs under torch.compile before torch 2.12.
    product = torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_scales.flatten(0, -2),
        scale_b=_pad(b_scales, (0, 0, 0, missing)).t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product[:, :columns].reshape(*a_scales.shape[:-1], columns).to(dtype)


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    return _pad(values.view(torch.uint8), (0, columns, 0, rows)).view(values.dtype).contiguous()


def _pad(values: Tensor, amounts: tuple[int, ...]) -> Tensor:
    """Padded with zeros; torch would copy what needs none."""
    return F.pad(values, amounts) if any(amounts) else values
