"""A block-scaled product in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.nvfp4_dequantise.reference import block_values


def nvfp4_matmul(
    a_codes: Tensor,
    a_scales: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """a · bᵀ: blocks lie along the contracted axis of both.

    The decode scales multiply the float32 sum of products, each of which float32 holds exactly. A
    result in float64 is summed in float64.

    Args:
        a_codes, a_scales, a_scale: [..., M, K] in NVFP4.
        b_codes, b_scales, b_scale: [N, K] in NVFP4.
        dtype: of the result.

    Returns:
        [..., M, N].
    """
    wide = torch.promote_types(dtype, torch.float32)
    a, b = block_values(a_codes, a_scales).to(wide), block_values(b_codes, b_scales).to(wide)
    return (a @ b.t() * (a_scale * b_scale)).to(dtype)
