"""Attention in FP8 whose result is quantised where it is centred again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lltk.ops.nvfp4_paged_attention.fp8 import Kernel, centred
from lltk.ops.nvfp4_paged_attention.reference import Pages


def compose(
    module: str,
    gather_fp8: Kernel,
    fp8_attention: Kernel,
    row_pipeline: Kernel,
    quantise_centred: Kernel,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """An implementation of `lltk::fp8_quantise_attention` whose operands are rounded to E4M3.

    It quantises what `lltk.ops.nvfp4_paged_attention.fp8.compose` gives.

    Args:
        module: the Python module that the implementation belongs to.
        gather_fp8, fp8_attention, row_pipeline, quantise_centred: implementations of
            `nvfp4_gather_fp8`, `fp8_attention`, `row_pipeline` and `fp8_quantise_centred`.
    """

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
    ) -> tuple[Tensor, Tensor]:
        found = centred(
            gather_fp8,
            fp8_attention,
            row_pipeline,
            q,
            k,
            v,
            Pages(k_codes, k_scales, k_decode_scales, k_means),
            Pages(v_codes, v_scales, v_decode_scales, v_means),
            table,
        )
        values, scales = quantise_centred(*found, q.dtype)
        return values, scales

    fp8_quantise_attention.__module__ = module
    return fp8_quantise_attention
