"""``lltk::hadamard``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.nvfp4_backends import implementation


@torch.library.custom_op("lltk::hadamard", mutates_args=())
def hadamard(x: Tensor, signs: list[int], backend: str = "reference") -> Tensor:
    """See `reference.hadamard`."""
    found: Tensor = implementation("hadamard", backend)(x, signs)
    return found


@hadamard.register_fake
def _(x: Tensor, signs: list[int], backend: str = "reference") -> Tensor:
    torch._check(x.shape[-1] % len(signs) == 0)
    return x.new_empty(x.shape)


OVERLOAD = torch.ops.lltk.hadamard.default
"""The op as a graph node's target."""
