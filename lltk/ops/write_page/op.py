"""``lltk::write_page``: the only op that changes a page."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.write_page import reference

DECLARATION = Declaration(Exactness.REFERENCE, "copies by index")


write_page = torch.library.custom_op(
    "lltk::write_page", reference.write_page, mutates_args=("pages",)
)
"""See `reference.write_page`."""


@write_page.register_fake
def _(pages: Tensor, value: Tensor, slot: Tensor) -> None:
    batch, _, tokens, heads, width = pages.shape
    torch._check(tuple(value.shape) == (batch, tokens, heads, width))
