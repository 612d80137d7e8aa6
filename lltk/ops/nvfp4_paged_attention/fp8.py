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

Kernel = Callable[..., Any]


def compose(
    op: str,
    module: str,
    finish: Kernel,
    gather_fp8: Kernel,
    fp8_attention: Kernel,
    row_pipeline: Kernel,
) -> Kernel:
    """An implementation of an op that attends as `lltk::nvfp4_paged_attention`, in E4M3.

    Attention's result is rounded to E4M3 before the centre of the values is added to it. It is
    multiplied by a scale first, which makes the largest element of the centred values E4M3's
    maximum.

    Args:
        op, module: the implementation's name and the Python module that it belongs to.
        finish: makes the op's result of four arguments: out, float8_e4m3fn [B, L, H, D]; its scale,
            float32 []; the values' centre, float32 [B, 1, H, D]; the dtype of the keys.
            Attention's result is out / scale + centre.
        gather_fp8, fp8_attention, row_pipeline: implementations of `nvfp4_gather_fp8` and of the
            ops of the other names.
    """

    def attend(
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
    ) -> Any:
        k_centre, v_centre = centre(k, k_means, table), centre(v, v_means, table)
        k_pages = (k_codes, k_scales, k_decode_scales, k_means)
        v_pages = (v_codes, v_scales, v_decode_scales, v_means)
        keys, _ = gather_fp8(k, k_centre, *k_pages, table)
        values, largest = gather_fp8(v, v_centre, *v_pages, table)
        most = round_e4m3(largest).float()
        scale = E4M3_MAX / most.masked_fill(most == 0, 1.0)
        out = fp8_attention(in_e4m3(q, row_pipeline), keys, values, scale)
        return finish(out, scale, v_centre, k.dtype)

    attend.__name__, attend.__module__ = op, module
    return attend


def in_e4m3(q: Tensor, row_pipeline: Kernel) -> Tensor:
    """Queries in E4M3, as they are or rounded."""
    if q.dtype is torch.float8_e4m3fn:
        return q
    (rounded,) = row_pipeline(q.flatten(2), to="e4m3")
    made: Tensor = rounded.view(q.shape)
    return made


def add_centre(fp8_dequantise: Kernel) -> Kernel:
    """What `compose` finishes `lltk::nvfp4_paged_attention` with.

    Args:
        fp8_dequantise: an implementation of the op of this name.
    """
    return lambda out, scale, centre, dtype: fp8_dequantise(out, scale.reciprocal(), dtype, centre)


def centre(own: Tensor, means: Tensor | None, table: Tensor) -> Tensor:
    """The centre that is subtracted from keys or values: float32 [B, 1, H, D].

    It is the mean over the tokens of the first listed page. If no page is listed, or pages have no
    means, it is the mean over the chunk's own tokens, [B, L, H, D].
    """
    if means is None or table.shape[0] == 0:
        return own.mean(1, keepdim=True, dtype=torch.float32)
    return means.index_select(1, table[:1]).float()
