"""Paged attention by cuDNN alone, through torch; differentiable in q, k and v."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.cudnn_dtypes import check_attends
from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.paged_attention.reference import gather

DECLARATION = Declaration(
    Exactness.ROUNDING, "cuDNN's attention over gathered pages", devices=("cuda",)
)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor
) -> Tensor:
    """`reference.paged_attention`; an error where cuDNN cannot run it.

    The operator is called by its name. Torch's switch between backends would hold for the whole
    process, and the decoder attends in another thread.

    Raises:
        ValueError: q is neither bfloat16 nor float16.
    """
    check_attends("paged_attention", q)
    queries, keys, values = (
        t.transpose(1, 2) for t in (q, gather(k, k_pages, table), gather(v, v_pages, table))
    )
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (queries, keys, values))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(queries, keys, values, None, grad)
    return found[0].transpose(1, 2)
