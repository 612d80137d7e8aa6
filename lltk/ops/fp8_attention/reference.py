"""Attention of FP8 operands."""

from __future__ import annotations

from torch import Tensor

from lltk.ops.floats import round_e4m3
from lltk.ops.paged_attention.reference import attention


def fp8_attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """e4m3(scale · softmax(q kᵀ / √D) v) per head, saturating.

    Args:
        q: float8_e4m3fn [B, L, H, D].
        k, v: float8_e4m3fn [B, M, H, D].
        scale: float32 [], of the result, which is a mean of rows of v.

    Returns:
        float8_e4m3fn [B, L, H, D].
    """
    return round_e4m3(attention(q.float(), k.float(), v.float()) * scale)
