"""Attention in FP8 over pages in NVFP4 or over what they are kept decoded to; quantised at once."""

from __future__ import annotations

from torch import Tensor

from lltk.ops.nvfp4_paged_attention import fp8
from lltk.ops.nvfp4_paged_attention.fp8 import Kernel


def compose(
    module: str,
    gather_fp8: Kernel,
    fp8_attention: Kernel,
    row_pipeline: Kernel,
    fp8_quantise_centred: Kernel,
    fp8_write_own: Kernel,
) -> Kernel:
    """An implementation of `fp8_quantise_attention` that attends in E4M3.

    Where pages are kept decoded and all but one are listed, attention reads them where they lie.
    The chunk's own keys and values go to the page that is left, which its commit will write again.
    Otherwise the listed pages are decoded first. Both ways attend to the same keys and values, bit
    for bit, in another order.

    Args:
        module: the Python module that the implementation belongs to.
        gather_fp8: of `nvfp4_gather_fp8`. The others are of the ops of their names.
    """
    decode = fp8.compose(
        "fp8_quantise_attention",
        module,
        fp8_quantise_centred,
        gather_fp8,
        fp8_attention,
        row_pipeline,
    )

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
        if k_decoded is None or table.shape[0] + 1 != k_decoded.shape[1]:
            k_pages = (k_codes, k_scales, k_decode_scales, k_means)
            v_pages = (v_codes, v_scales, v_decode_scales, v_means)
            made: tuple[Tensor, Tensor] = decode(q, k, v, *k_pages, *v_pages, table)
            return made
        assert v_decoded is not None and v_means is not None
        scale = fp8_write_own(k_decoded, v_decoded, v_largest, k, v, k_means, v_means, table)
        keys, values = k_decoded.flatten(1, 2), v_decoded.flatten(1, 2)
        out = fp8_attention(fp8.in_e4m3(q, row_pipeline), keys, values, scale)
        quantised: tuple[Tensor, Tensor] = fp8_quantise_centred(out, scale, v_means[:, :1], k.dtype)
        return quantised

    fp8_quantise_attention.__module__ = module
    return fp8_quantise_attention
