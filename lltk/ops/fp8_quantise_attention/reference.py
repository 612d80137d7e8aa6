"""Attention over pages in NVFP4 and quantisation to FP8, one after another."""

from __future__ import annotations

from torch import Tensor

from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.nvfp4_paged_attention.reference import nvfp4_paged_attention


def fp8_quantise_attention(
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
    k_decoded: Tensor | None = None,
    k_largest: Tensor | None = None,
    v_decoded: Tensor | None = None,
    v_largest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as `nvfp4_paged_attention` does, and quantise the heads of each token as one FP8 row.

    Args:
        q, k, v: as there; queries may be in E4M3.
        k_codes, k_scales, k_decode_scales, k_means: as there.
        v_codes, v_scales, v_decode_scales, v_means: as there.
        table: as there.
        k_decoded, k_largest, v_decoded, v_largest: what `fp8_decode_page` made of the pages, for
            implementations that attend in FP8. These may use the page that is free.

    Returns:
        What `fp8_quantise` makes of attention's result as [B, L, H · D].
    """
    attended = nvfp4_paged_attention(
        q.to(k.dtype),
        k,
        v,
        k_codes,
        k_scales,
        k_decode_scales,
        k_means,
        v_codes,
        v_scales,
        v_decode_scales,
        v_means,
        table,
    )
    return fp8_quantise(attended.flatten(2))
