"""``lltk::upsample_residual``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.upsample_residual import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


upsample_residual = torch.library.custom_op(
    "lltk::upsample_residual", reference.upsample_residual, mutates_args=()
)
"""See `reference.upsample_residual`."""


@upsample_residual.register_fake
def empty_result(phases: Tensor, bias: Tensor, shortcut: Tensor, stride: int) -> Tensor:
    """The result's tensor, not filled."""
    batch, width, given, height, columns = shortcut.shape
    images, channels = phases.shape[0], phases.shape[1] // 4
    torch._check(images % batch == 0 and images // batch <= given * stride)
    torch._check(tuple(phases.shape[1:]) == (4 * bias.numel(), height + 1, columns + 1))
    torch._check(4 * channels * stride % width == 0)
    shape = (batch, channels, images // batch, 2 * height, 2 * columns)
    layout = torch.channels_last_3d
    return torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=layout)
