"""Attention over pages in NVFP4 and quantisation to FP8, one after another."""

from __future__ import annotations

from torch import Tensor

from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.nvfp4_paged_attention.reference import Pages, nvfp4_paged_attention


def fp8_quantise_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Pages, v_pages: Pages, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The heads of a token, as `nvfp4_paged_attention` has them, as one FP8 row.

    Args:
        q, k, v, k_pages, v_pages, table: as there.

    Returns:
        What `fp8_quantise` makes of [B, L, H · D].
    """
    return fp8_quantise(nvfp4_paged_attention(q, k, v, k_pages, v_pages, table).flatten(2))
