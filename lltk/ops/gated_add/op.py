"""``lltk::gated_add``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.gated_add import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


@torch.library.custom_op("lltk::gated_add", mutates_args=())
def gated_add(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """See `reference.gated_add`."""
    return reference.gated_add(x, y, gate)


@gated_add.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    torch._check(x.shape == y.shape and (gate is None or gate.shape[-1] == x.shape[-1]))
    return x.new_empty(x.shape)


OVERLOAD = torch.ops.lltk.gated_add.default
"""The op as a graph node's target."""
