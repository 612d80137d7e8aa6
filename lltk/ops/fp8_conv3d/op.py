"""``lltk::fp8_conv3d``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_conv3d import reference

DECLARATION = Declaration(Exactness.REFERENCE, "decodes operands to float32")


fp8_conv3d = torch.library.custom_op("lltk::fp8_conv3d", reference.fp8_conv3d, mutates_args=())
"""See `reference.fp8_conv3d`."""


@fp8_conv3d.register_fake
def empty_result(
    frames: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The result's tensor, not filled."""
    batch, width, count, height, columns = frames.shape
    wide, rows = weight.shape[0], reference.TAPS * width
    torch._check(weight.shape[1] == rows and tuple(weight_scales.shape) == (wide, 1))
    torch._check(bias is None or bias.numel() == wide)
    size = (batch, wide, count - 2, height - 2, columns - 2)
    layout = torch.channels_last_3d
    return torch.empty(size, dtype=dtype, device=frames.device, memory_format=layout)
