"""Decode the listed pages to E4M3, then attend in FP8; without gradients.

Tensor cores that multiply FP8 sum with few bits. What all values of a channel have in common would
use them up, and says nothing; so it is taken off first. This is exact, whatever is taken off:

    softmax(q (k − a)ᵀ) (v − c) + c = softmax(q kᵀ) v,

since q aᵀ is the same for every key, and each row of the softmax sums to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.floats import E4M3_MAX, round_e4m3
from lltk.ops.fp8_attention.op import fp8_attention
from lltk.ops.nvfp4_paged_attention.reference import Pages, gather


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
) -> Tensor:
    """`lltk::nvfp4_paged_attention` of operands rounded to E4M3, by cuDNN on a GPU.

    The result is rounded too, as `centred` says.
    """
    k_pages = Pages(k_codes, k_scales, k_decode_scales, k_means)
    v_pages = Pages(v_codes, v_scales, v_decode_scales, v_means)
    out, scale, v_centre = centred(q, k, v, k_pages, v_pages, table)
    return (out.float() / scale + v_centre).to(q.dtype)


def centred(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Pages, v_pages: Pages, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fp8_decode` adds a centre to.

    Returns:
        out, float8_e4m3fn [B, L, H, D]; its scale, float32 []: what the largest element of v,
        centred, weighs alone is E4M3's maximum; the centre, float32 [B, 1, H, D]. The result is
        out / scale + centre.
    """
    k_centre, v_centre = (
        centre(own, pages.means, table) for own, pages in ((k, k_pages), (v, v_pages))
    )
    keys, _ = gather_fp8(k, k_centre, *k_pages, table)
    values, largest = gather_fp8(v, v_centre, *v_pages, table)
    most = round_e4m3(largest).float()
    scale = E4M3_MAX / most.masked_fill(most == 0, 1.0)
    return fp8_attention(round_e4m3(q), keys, values, scale), scale, v_centre


def centre(own: Tensor, means: Tensor | None, table: Tensor) -> Tensor:
    """What is taken off keys or values: float32 [B, 1, H, D].

    The mean over the tokens of the first page listed or, where none is or pages have no means, of
    the chunk's own [B, L, H, D].
    """
    if means is None or table.shape[0] == 0:
        return own.mean(1, keepdim=True, dtype=torch.float32)
    return means.index_select(1, table[:1]).float()


@torch.library.custom_op("lltk::nvfp4_gather_fp8", mutates_args=())
def gather_fp8(
    own: Tensor,
    centre: Tensor,
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """The listed pages, decoded, then the chunk's own, less a centre, saturating.

    Args:
        own: [B, L, H, D].
        centre: float32 [B, 1, H, D].
        codes, scales, decode_scales, means: the arena, as `reference.Pages`.
        table: int64 [N].

    Returns:
        float8_e4m3fn [B, N * T + L, H, D], and the largest magnitude among them before they were
        rounded: float32 [], NaN where one is.
    """
    if own.is_cuda:
        from lltk.ops.nvfp4_paged_attention import triton

        return triton.gather_fp8(own, centre, codes, scales, decode_scales, means, table)
    pages = Pages(codes, scales, decode_scales, means)
    values = gather(own, pages, table, torch.float32) - centre
    return round_e4m3(values), values.abs().amax()


@gather_fp8.register_fake
def _(own: Tensor, centre: Tensor, codes: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    table = rest[-1]
    assert table is not None
    batch, length, heads, width = own.shape
    torch._check(tuple(centre.shape) == (batch, 1, heads, width))
    size = (batch, table.shape[0] * codes.shape[2] + length, heads, width)
    return own.new_empty(size, dtype=torch.float8_e4m3fn), own.new_empty((), dtype=torch.float32)
