"""``lltk::fp8_attention``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

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
