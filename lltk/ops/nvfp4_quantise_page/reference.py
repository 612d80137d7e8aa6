"""A chunk's keys or values as a page in NVFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.nvfp4_quantise.reference import amax, nvfp4_quantise


def nvfp4_quantise_page(value: Tensor, smoothing: bool, rule: str = "none") -> list[Tensor]:
    """Quantise a chunk's keys or values.

    Blocks lie along D, and each head has a decode scale of its own. With smoothing, the codes hold
    the values less each channel's mean over the tokens, rounded. The mean is summed in float64, so
    that it does not depend on the order of the sum.

    Args:
        value: [B, T, H, D].
        smoothing: whether channels' means are kept apart.
        rule: Four Over Six rule, one of `lltk.ops.nvfp4_quantise.reference.RULES`.

    Returns:
        Codes, uint8 [B, T, H, D/2]; scales, float8_e4m3fn [B, T, H, D/16]; decode scales, float32
        [B, H], NaN where a head's values are not finite; and with smoothing means, bfloat16
        [B, H, D].
    """
    heads = value.float().transpose(1, 2)
    means = []
    if smoothing:
        means = [heads.mean(2, dtype=torch.float64).to(torch.bfloat16)]
        heads = heads - means[0].unsqueeze(2)
    page = nvfp4_quantise(heads, rule=rule, largest=amax(heads, 2))
    codes = page.codes.transpose(1, 2).contiguous()
    # Bytes, because torch copies no transposed float8 on every device.
    scales = page.scales.view(torch.uint8).transpose(1, 2).contiguous().view(torch.float8_e4m3fn)
    return [codes, scales, page.decode_scale, *means]
