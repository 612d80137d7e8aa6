"""All pages of an arena in NVFP4, decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.nvfp4_paged_attention.reference import Pages, decode


def nvfp4_decode_pages(
    codes: Tensor, scales: Tensor, decode_scales: Tensor, means: Tensor | None
) -> Tensor:
    """e2m1(code) · scale · decode scale, plus the channel's mean.

    Args:
        codes, scales, decode_scales, means: an arena, as `Pages` has it.

    Returns:
        float32 [B, P, T, H, D].
    """
    count, tokens = codes.shape[1:3]
    every = torch.arange(count, device=codes.device)
    values = decode(Pages(codes, scales, decode_scales, means), every)
    return values.unflatten(1, (count, tokens))
