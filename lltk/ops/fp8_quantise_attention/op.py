"""``lltk::fp8_quantise_attention``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise_attention import reference
from lltk.ops.fp8_rows import new_fp8
from lltk.ops.nvfp4_paged_attention.op import OVERLOAD as ATTENTION
from lltk.ops.nvfp4_paged_attention.reference import Pages

DECLARATION = Declaration(
    Exactness.REFERENCE, "nvfp4_paged_attention's reference, then fp8_quantise's"
)


@torch.library.custom_op("lltk::fp8_quantise_attention", mutates_args=())
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
    """See `reference.fp8_quantise_attention`."""
    k_pages = Pages(k_codes, k_scales, k_decode_scales, k_means)
    v_pages = Pages(v_codes, v_scales, v_decode_scales, v_means)
    return reference.fp8_quantise_attention(q, k, v, k_pages, v_pages, table)


@fp8_quantise_attention.register_fake
def _(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    return new_fp8(ATTENTION(q, *rest).flatten(2))


OVERLOAD = torch.ops.lltk.fp8_quantise_attention.default
"""The op as a graph node's target."""
