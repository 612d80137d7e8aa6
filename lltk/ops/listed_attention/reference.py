"""Attention of a chunk over its own keys and the pages that a mask lists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def listed_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, listed: Tensor
) -> Tensor:
    """`paged_attention` with a mask in the place of the table, so that no shape depends on it.

    What lies in a page that is not listed does not reach the result, be it NaN: a key of weight 0
    would still multiply its value by 0, so such pages are read as zeros.

    Args:
        q, k, v: [B, L, H, D], this chunk's.
        k_pages, v_pages: [B, P, T, H, D], the arenas.
        listed: bool [P], the committed pages to attend to; there may be none.

    Returns:
        [B, L, H, D] in ``q``'s dtype.
    """
    pages, tokens = k_pages.shape[1:3]
    seen = torch.cat([listed.repeat_interleave(tokens), listed.new_ones(k.shape[1])])
    keys, values = (_joined(own, arena, listed) for own, arena in ((k, k_pages), (v, v_pages)))
    queries, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
    mask = seen.expand(q.shape[1], pages * tokens + k.shape[1])
    result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return result.transpose(1, 2).contiguous()


def _joined(own: Tensor, arena: Tensor, listed: Tensor) -> Tensor:
    """All pages, those that are not listed as zeros, then the chunk's own, [B, P * T + L, H, D]."""
    finite = torch.where(listed.view(1, -1, 1, 1, 1), arena, arena.new_zeros(()))
    return torch.cat([finite.flatten(1, 2).to(own.dtype), own], dim=1)
