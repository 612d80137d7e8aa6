"""Decode the listed pages to E4M3, then attend in FP8; without gradients.

Tensor cores that multiply FP8 sum with few bits. A large part that all values of a channel share
would use these bits up. So a centre is subtracted from each channel of the keys and of the values,
a and c, and c is added to the result. This is exact, whatever the centres are:

    softmax(q (k − a)ᵀ) (v − c) + c = softmax(q kᵀ) v,

since q aᵀ is the same for every key, and each row of the softmax sums to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lltk.ops.floats import E4M3_MAX, round_e4m3
from lltk.ops.nvfp4_paged_attention.reference import Pages

Kernel = Callable[..., Any]


def compose(
    module: str,
    gather_fp8: Kernel,
    fp8_attention: Kernel,
    row_pipeline: Kernel,
    fp8_dequantise: Kernel,
) -> Callable[..., Tensor]:
    """An implementation of `lltk::nvfp4_paged_attention` whose operands are rounded to E4M3.

    The result is rounded too, as `centred` says.

    Args:
        module: the Python module that the implementation belongs to.
        gather_fp8, fp8_attention, row_pipeline, fp8_dequantise: implementations of
            `nvfp4_gather_fp8` and of the ops of the other names.
    """

    def nvfp4_paged_attention(
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
        out, scale, v_centre = centred(
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
        return fp8_dequantise(out, scale.reciprocal(), q.dtype, v_centre)

    nvfp4_paged_attention.__module__ = module
    return nvfp4_paged_attention


def centred(
    gather_fp8: Kernel,
    fp8_attention: Kernel,
    row_pipeline: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    table: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in FP8 before the centre of the values is added to it.

    Args:
        gather_fp8, fp8_attention, row_pipeline: as of `compose`.
        q, k, v, k_pages, v_pages, table: as of `reference.nvfp4_paged_attention`.

    Returns:
        out, float8_e4m3fn [B, L, H, D]; its scale, float32 [], which makes the largest element of
        the centred values E4M3's maximum; the values' centre, float32 [B, 1, H, D]. Attention's
        result is out / scale + centre.
    """
    k_centre, v_centre = (
        centre(own, pages.means, table) for own, pages in ((k, k_pages), (v, v_pages))
    )
    keys, _ = gather_fp8(k, k_centre, *k_pages, table)
    values, largest = gather_fp8(v, v_centre, *v_pages, table)
    most = round_e4m3(largest).float()
    scale = E4M3_MAX / most.masked_fill(most == 0, 1.0)
    (queries,) = row_pipeline(q.flatten(2), to="e4m3")
    return fp8_attention(queries.view(q.shape), keys, values, scale), scale, v_centre


def centre(own: Tensor, means: Tensor | None, table: Tensor) -> Tensor:
    """The centre that is subtracted from keys or values: float32 [B, 1, H, D].

    It is the mean over the tokens of the first listed page. If no page is listed, or pages have no
    means, it is the mean over the chunk's own tokens, [B, L, H, D].
    """
    if means is None or table.shape[0] == 0:
        return own.mean(1, keepdim=True, dtype=torch.float32)
    return means.index_select(1, table[:1]).float()
