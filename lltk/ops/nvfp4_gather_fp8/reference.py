"""Keys or values in E4M3: the listed pages, decoded, then the chunk's own."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.floats import round_e4m3
from lltk.ops.nvfp4_paged_attention.reference import Pages, gather


def nvfp4_gather_fp8(
    own: Tensor,
    centre: Tensor,
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Decode the listed pages, append the chunk's own, subtract a centre, and round to E4M3.

    Values beyond ±448 saturate.

    Args:
        own: [B, L, H, D].
        centre: float32 [B, 1, H, D].
        codes, scales, decode_scales, means: the arena, as
            `lltk.ops.nvfp4_paged_attention.reference.Pages`.
        table: int64 [N].

    Returns:
        float8_e4m3fn [B, N * T + L, H, D], and the largest magnitude among them before they were
        rounded: float32 [], NaN where one is.
    """
    pages = Pages(codes, scales, decode_scales, means)
    values = gather(own, pages, table, torch.float32) - centre
    return round_e4m3(values), values.abs().amax()
