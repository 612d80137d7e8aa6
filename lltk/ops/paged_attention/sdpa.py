"""Paged attention through torch's scaled_dot_product_attention; differentiable in q, k and v."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.paged_attention.reference import gather

DECLARATION = Declaration(Exactness.ROUNDING, "torch's attention over gathered pages", default=True)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor
) -> Tensor:
    """`reference.paged_attention`, by the backend torch picks for the device."""
    return attend(q, gather(k, k_pages, table), gather(v, v_pages, table))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of token-major operands."""
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
