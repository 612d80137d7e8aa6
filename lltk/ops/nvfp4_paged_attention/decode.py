"""Decode the listed pages, then attend; differentiable in q, k and v."""

from __future__ import annotations

from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_paged_attention.reference import Pages, gather
from lltk.ops.paged_attention.sdpa import attend

DECLARATION = Declaration(
    Exactness.ROUNDING, "decodes pages in torch, then torch's attention", default=True
)


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
    """`lltk::nvfp4_paged_attention`, pages decoded to the chunk's dtype, by torch's attention.

    Torch picks the attention's backend for the device.
    """
    keys = gather(k, Pages(k_codes, k_scales, k_decode_scales, k_means), table, k.dtype)
    values = gather(v, Pages(v_codes, v_scales, v_decode_scales, v_means), table, v.dtype)
    return attend(q, keys, values)
