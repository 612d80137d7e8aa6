"""``lltk::fp8_attention``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.floats import E4M3_MAX, to_e4m3
from lltk.ops.fp8_attention import reference


@torch.library.custom_op("lltk::fp8_attention", mutates_args=())
def fp8_attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """See `reference.fp8_attention`; by cuDNN on a GPU."""
    if q.is_cuda:
        from lltk.ops.fp8_attention import cudnn

        return cudnn.fp8_attention(q, k, v, scale)
    return reference.fp8_attention(q, k, v, scale)


@fp8_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    torch._check(k.shape == v.shape and q.shape[2:] == k.shape[2:])
    return q.new_empty(q.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, most: Tensor) -> Tensor:
    """`fp8_attention` of q rounded to E4M3, scaled so that `most` becomes E4M3's maximum.

    Args:
        q: [B, L, H, D], any floating dtype.
        k, v: float8_e4m3fn [B, M, H, D].
        most: float32 [], the largest magnitude in v.

    Returns:
        float32 [B, L, H, D], the scale taken off again.
    """
    scale = E4M3_MAX / most.masked_fill(most == 0, 1.0)
    return fp8_attention(to_e4m3(q), k, v, scale).float() / scale
