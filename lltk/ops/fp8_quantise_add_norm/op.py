"""``lltk::fp8_quantise_add_norm``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise.op import new_fp8
from lltk.ops.fp8_quantise_add_norm import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


@torch.library.custom_op("lltk::fp8_quantise_add_norm", mutates_args=())
def fp8_quantise_add_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.fp8_quantise_add_norm`."""
    return reference.fp8_quantise_add_norm(x, y, gate, scale, shift, eps)


@fp8_quantise_add_norm.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.shape == y.shape and (gate is None or gate.shape[-1] == x.shape[-1]))
    torch._check(scale.shape[-1] == x.shape[-1] and shift.shape == scale.shape)
    return (x.new_empty(x.shape), *new_fp8(x))


OVERLOAD = torch.ops.lltk.fp8_quantise_add_norm.default
"""The op as a graph node's target."""
