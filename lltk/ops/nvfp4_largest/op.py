"""``lltk::nvfp4_largest``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_largest import reference

DECLARATION = Declaration(Exactness.REFERENCE, "torch")

nvfp4_largest = torch.library.custom_op(
    "lltk::nvfp4_largest", reference.nvfp4_largest, mutates_args=()
)
"""See `reference.nvfp4_largest`."""


@nvfp4_largest.register_fake
def _(x: Tensor, signs: list[int]) -> Tensor:
    return x.new_empty(2, dtype=torch.float32)
