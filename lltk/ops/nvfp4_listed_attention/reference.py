"""Attention to pages in NVFP4 that a mask lists."""

from __future__ import annotations

from torch import Tensor

from lltk.ops.listed_attention.reference import listed_attention
from lltk.ops.nvfp4_decode_pages.reference import nvfp4_decode_pages


def nvfp4_listed_attention(
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
    listed: Tensor,
) -> Tensor:
    """`listed_attention` to pages that `nvfp4_decode_pages` decodes.

    Args:
        q, k, v: [B, L, H, D], this chunk's.
        k_codes, k_scales, k_decode_scales, k_means: the keys' arena, as `Pages` has it.
        v_codes, v_scales, v_decode_scales, v_means: the values'.
        listed: bool [P], the committed pages to attend to; what lies in others does not matter.

    Returns:
        [B, L, H, D] in ``q``'s dtype.
    """
    keys = nvfp4_decode_pages(k_codes, k_scales, k_decode_scales, k_means)
    values = nvfp4_decode_pages(v_codes, v_scales, v_decode_scales, v_means)
    return listed_attention(q, k, v, keys, values, listed)
