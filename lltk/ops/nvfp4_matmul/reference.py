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

    The decode scales multiply the float32 sum of products, each of which float32 holds exactly.

    Args:
        a_codes, a_scales, a_scale: [..., M, K] in NVFP4.
        b_codes, b_scales, b_scale: [N, K] in NVFP4.
        dtype: of the result.

    Returns:
        [..., M, N].
    """
    product = block_values(a_codes, a_scales) @ block_values(b_codes, b_scales).t()
    return (product * (a_scale * b_scale)).to(dtype)
