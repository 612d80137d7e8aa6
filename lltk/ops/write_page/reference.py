"""Write one page of a cache arena."""

from __future__ import annotations

from torch import Tensor


def write_page(pages: Tensor, value: Tensor, slot: Tensor) -> None:
    """Copy a chunk's keys or values into one page; every other page keeps its bytes.

    Args:
        pages: [B, P, T, H, D], the arena, written in place and cast to its dtype.
        value: [B, T, H, D].
        slot: int64 [1], the page, on the arena's device.
    """
    pages.index_copy_(1, slot, value.to(pages.dtype).unsqueeze(1))
