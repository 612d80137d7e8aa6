"""``lltk::rms_norm_rope``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.rms_norm_rope import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


rms_norm_rope = torch.library.custom_op(
    "lltk::rms_norm_rope", reference.rms_norm_rope, mutates_args=()
)
"""See `reference.rms_norm_rope`."""


@rms_norm_rope.register_fake
def new_heads(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, to: str = "plain"
) -> Tensor:
    """An empty tensor for the result."""
    batch, length, width = x.shape
    torch._check(weight.shape == (width,) and cos.shape == sin.shape)
    torch._check(cos.shape[:3] == (1, length, 1) and width % cos.shape[3] == 0)
    torch._check(to in ("plain", "e4m3"))
    dtype = torch.float8_e4m3fn if to == "e4m3" else x.dtype
    return x.new_empty((batch, length, width // cos.shape[3], cos.shape[3]), dtype=dtype)
