"""``lltk::rope_table``: no gradient flows to positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.rope_table import reference

DECLARATION = Declaration(Exactness.REFERENCE, "angles in float64, rounded to float32")


rope_table = torch.library.custom_op("lltk::rope_table", reference.rope_table, mutates_args=())
"""See `reference.rope_table`."""


@rope_table.register_fake
def _(
    positions: Tensor, height: int, width: int, split: Sequence[int], theta: float
) -> tuple[Tensor, Tensor]:
    shape = (1, positions.shape[0] * height * width, 1, sum(split))
    cos = positions.new_empty(shape, dtype=torch.float32)
    return cos, torch.empty_like(cos)
