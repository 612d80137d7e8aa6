"""Write one page of a cache arena."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.floats import to_e4m3


def write_page(pages: Tensor, value: Tensor, slot: Tensor) -> None:
    """Copy a chunk's keys or values into one page; every other page keeps its bytes.

    Args:
        pages: [B, P, T, H, D], the arena, written in place and cast to its dtype, E4M3 saturating.
        value: [B, T, H, D].
        slot: int64 [1], the page, on the arena's device.
    """
    if pages.dtype is torch.float8_e4m3fn:
        pages, value = pages.view(torch.uint8), to_e4m3(value).view(torch.uint8)
    pages.index_copy_(1, slot, value.to(pages.dtype).unsqueeze(1))
