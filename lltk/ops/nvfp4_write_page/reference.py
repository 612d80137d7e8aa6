"""Write one page of a cache arena in NVFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.nvfp4_quantise.reference import amax, nvfp4_quantise


def nvfp4_write_page(
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    value: Tensor,
    slot: Tensor,
    rule: str = "none",
) -> None:
    """Quantise a chunk's keys or values into one page; every other page keeps its bytes.

    Blocks lie along D, and each head of a page has a decode scale of its own. With ``means`` the
    page holds each channel's mean over the tokens, rounded, and the codes hold the values less this
    mean. The mean is summed in float64, so that it does not depend on the order of the sum.

    Args:
        codes: uint8 [B, P, T, H, D/2], written in place as are the three that follow.
        scales: float8_e4m3fn [B, P, T, H, D/16].
        decode_scales: float32 [B, P, H]; NaN where a head's values are not finite.
        means: bfloat16 [B, P, H, D], or None for no smoothing.
        value: [B, T, H, D].
        slot: int64 [1], the page, on the arenas' device.
        rule: Four Over Six rule, one of `lltk.ops.nvfp4_quantise.reference.RULES`.
    """
    heads = value.float().transpose(1, 2)
    if means is not None:
        mean = heads.mean(2, dtype=torch.float64).to(means.dtype)
        means.index_copy_(1, slot, mean.unsqueeze(1))
        heads = heads - mean.unsqueeze(2)
    page = nvfp4_quantise(heads, rule=rule, largest=amax(heads, 2))
    codes.index_copy_(1, slot, page.codes.transpose(1, 2).unsqueeze(1))
    # Bytes, because torch copies no float8 by index on a CPU.
    bytes_ = page.scales.view(torch.uint8).transpose(1, 2).unsqueeze(1)
    scales.view(torch.uint8).index_copy_(1, slot, bytes_)
    decode_scales.index_copy_(1, slot, page.decode_scale.unsqueeze(1))
