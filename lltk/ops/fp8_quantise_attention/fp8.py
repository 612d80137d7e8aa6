"""Attention in FP8 whose result is quantised where it is centred again."""

from __future__ import annotations

from torch import Tensor

from lltk.ops.fp8_quantise_centred.op import fp8_quantise_centred
from lltk.ops.nvfp4_paged_attention.fp8 import centred
from lltk.ops.nvfp4_paged_attention.reference import Pages


def fp8_decode(
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
) -> tuple[Tensor, Tensor]:
    """`lltk::fp8_quantise_attention` of what `nvfp4_paged_attention.fp8.fp8_decode` gives."""
    k_pages = Pages(k_codes, k_scales, k_decode_scales, k_means)
    v_pages = Pages(v_codes, v_scales, v_decode_scales, v_means)
    return fp8_quantise_centred(*centred(q, k, v, k_pages, v_pages, table), q.dtype)
