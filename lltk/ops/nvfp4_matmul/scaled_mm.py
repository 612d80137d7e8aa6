"""The block-scaled product of ``torch.nn.functional.scaled_mm``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, pad, scaled_mm

from lltk.ops.declaration import E2M1, Declaration, Exactness
from lltk.ops.scale_layout import swizzle

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "NVFP4 tensor cores by cuBLAS",
    devices=("cuda",),
    architectures=E2M1,
    opaque=True,
)

_BYTES, _COLUMNS = 16, 16
"""A row of codes is a multiple of so many bytes, and the second operand of so many rows."""


def nvfp4_matmul(
    a_codes: Tensor,
    a_scales: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.nvfp4_matmul`, but float32 sums may be rounded in another order.

    Rows are padded to 32 codes and ``b`` to 16 rows, with zeros, where they are not multiples.
    """
    columns = b_codes.shape[0]
    product = scaled_mm(
        _codes(a_codes.flatten(0, -2)),
        _codes(pad(b_codes, (0, 0, 0, -columns % _COLUMNS))).t(),
        [_scales(a_scales.flatten(0, -2)), a_scale],
        [ScalingType.BlockWise1x16, ScalingType.TensorWise],
        [_scales(pad(b_scales.view(torch.uint8), (0, 0, 0, -columns % _COLUMNS))), b_scale],
        [ScalingType.BlockWise1x16, ScalingType.TensorWise],
        swizzle_a=[SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE],
        swizzle_b=[SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE],
        output_dtype=dtype,
    )
    return product[:, :columns].reshape(*a_codes.shape[:-1], columns).contiguous()


def _codes(codes: Tensor) -> Tensor:
    return pad(codes, (0, -codes.shape[1] % _BYTES)).contiguous().view(torch.float4_e2m1fn_x2)


def _scales(scales: Tensor) -> Tensor:
    scales = scales.view(torch.uint8)
    return swizzle(pad(scales, (0, scales.shape[1] % 2))).view(torch.float8_e4m3fn)
