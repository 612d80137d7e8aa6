"""``lltk::fp8_decode_page``: the only op that changes a page that is kept decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_decode_page import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


@torch.library.custom_op("lltk::fp8_decode_page", mutates_args=("decoded", "largest"))
def fp8_decode_page(
    decoded: Tensor,
    largest: Tensor,
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor,
    slot: Tensor,
) -> None:
    """See `reference.with_gather`."""
    reference.fp8_decode_page(decoded, largest, codes, scales, decode_scales, means, slot)


@fp8_decode_page.register_fake
def _(
    decoded: Tensor,
    largest: Tensor,
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor,
    slot: Tensor,
) -> None:
    *page, half = codes.shape
    torch._check(tuple(decoded.shape) == (*page, 2 * half))
    torch._check(tuple(largest.shape) == tuple(page[:2]) and means.shape[1] == page[1])
