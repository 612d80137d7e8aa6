"""Decode the listed pages, then attend; differentiable in q, k and v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lltk.ops.nvfp4_paged_attention import reference
from lltk.ops.nvfp4_paged_attention.reference import Pages


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    k_decode_scales: Tensor,
    k_means: Tensor | None,
    v_codes: Tensor,
    v_scales: Tensor,
    v_decode_scales: Tensor,
    v_means: Tensor | None,
    table: Tensor,
) -> Tensor:
    """`reference.nvfp4_paged_attention`, pages decoded to the chunk's dtype, by torch's attention.

    Torch picks the attention's backend for the device.
    """
    keys = _gather(k, Pages(k_codes, k_scales, k_decode_scales, k_means), table)
    values = _gather(v, Pages(v_codes, v_scales, v_decode_scales, v_means), table)
    return attend(q, keys, values)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of token-major operands."""
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


def _gather(own: Tensor, pages: Pages, table: Tensor) -> Tensor:
    return torch.cat([reference.decode(pages, table).to(own.dtype), own], dim=1)
