"""``lltk::cached_norm_silu``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.cached_norm_silu import reference
from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


cached_norm_silu = torch.library.custom_op(
    "lltk::cached_norm_silu", reference.cached_norm_silu, mutates_args=()
)
"""See `reference.cached_norm_silu`."""


@cached_norm_silu.register_fake
def empty_results(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    cache: Tensor | None = None,
    keep: bool = False,
) -> list[Tensor]:
    """The results' tensors, not filled."""
    batch, width, frames, *sides = x.shape
    kept = checked_cache(x, gamma, bias, residual, cache)
    total = [tuple(x.shape)] if keep else []
    shapes = [(batch, width, reference.CACHED + frames, *sides), kept, *total]
    layout = torch.channels_last_3d
    return [
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout) for shape in shapes
    ]


def checked_cache(
    x: Tensor, gamma: Tensor, bias: Tensor | None, residual: Tensor | None, cache: Tensor | None
) -> tuple[int, ...]:
    """Check that operands fit together; gives the shape of their cache, [B, C, 2, H, W]."""
    batch, width, _, *sides = x.shape
    torch._check(gamma.numel() == width and (bias is None or bias.numel() == width))
    torch._check(residual is None or residual.shape == x.shape)
    kept = (batch, width, reference.CACHED, *sides)
    torch._check(cache is None or tuple(cache.shape) == kept)
    return kept
