"""The product of rows in FP8."""

from __future__ import annotations

import torch
from torch import Tensor


def fp8_matmul(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """a bᵀ + bias of operands that `fp8_quantise` made, summed in float32.

    Args:
        a: float8_e4m3fn [..., M, K], with scales float32 [..., M, 1].
        b: float8_e4m3fn [N, K], with scales float32 [N, 1].
        bias: [N], added before the result is rounded.
        dtype: of the result.

    Returns:
        [..., M, N].
    """
    product = (a.float() @ b.float().t()) * a_scales * b_scales.t()
    return (product if bias is None else product + bias.float()).to(dtype)
