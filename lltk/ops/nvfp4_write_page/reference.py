"""Write one page of a cache arena in NVFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.nvfp4_quantise_page.reference import nvfp4_quantise_page


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

    The page is what `nvfp4_quantise_page` makes of the values, with smoothing where ``means`` are
    given.

    Args:
        codes: uint8 [B, P, T, H, D/2], written in place as are the three that follow.
        scales: float8_e4m3fn [B, P, T, H, D/16].
        decode_scales: float32 [B, P, H]; NaN where a head's values are not finite.
        means: bfloat16 [B, P, H, D], or None for no smoothing.
        value: [B, T, H, D].
        slot: int64 [1], the page, on the arenas' device.
        rule: Four Over Six rule, one of `lltk.ops.nvfp4_quantise.reference.RULES`.
    """
    page = nvfp4_quantise_page(value, means is not None, rule)
    for arena, part in zip((codes, scales, decode_scales, means), page, strict=False):
        assert arena is not None
        # Bytes, because torch copies no float8 by index on a CPU.
        as_bytes = arena.dtype is torch.float8_e4m3fn
        to, new = (t.view(torch.uint8) if as_bytes else t for t in (arena, part))
        to.index_copy_(1, slot, new.unsqueeze(1))
