"""A chunk's own keys and values in E4M3, in the page that a table leaves free."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.floats import E4M3_MAX, round_e4m3


def fp8_write_own(
    k_decoded: Tensor,
    v_decoded: Tensor,
    v_largest: Tensor,
    k: Tensor,
    v: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    table: Tensor,
) -> Tensor:
    """Subtract the means of page 0, round to E4M3, and write the free page.

    Args:
        k_decoded, v_decoded: float8_e4m3fn [B, P, T, H, D], written in place.
        v_largest: float32 [B, P], the largest magnitude in each page of values before it was
            rounded; not changed.
        k, v: [B, T, H, D].
        k_means, v_means: bfloat16 [B, P, H, D].
        table: int64 [P - 1], all pages but one.

    Returns:
        What attention's result is multiplied by before it is rounded to E4M3, float32 []: the
        largest value there is, own ones included, becomes E4M3's maximum.
    """
    pages = k_decoded.shape[1]
    free = (pages * (pages - 1) // 2 - table.sum()).view(1)
    most = v_largest.index_select(1, table).amax()
    for decoded, own, means in ((k_decoded, k, k_means), (v_decoded, v, v_means)):
        values = own.float() - means[:, :1]
        page = round_e4m3(values).view(torch.uint8)
        decoded.view(torch.uint8).index_copy_(1, free, page.unsqueeze(1))
    most = round_e4m3(torch.maximum(most, values.abs().amax())).float()
    return E4M3_MAX / most.masked_fill(most == 0, 1.0)
