"""``lltk::fp8_cached_norm_silu``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.cached_norm_silu.op import checked_cache
from lltk.ops.cached_norm_silu.reference import CACHED
from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_cached_norm_silu import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


fp8_cached_norm_silu = torch.library.custom_op(
    "lltk::fp8_cached_norm_silu", reference.fp8_cached_norm_silu, mutates_args=()
)
"""See `reference.fp8_cached_norm_silu`."""


@fp8_cached_norm_silu.register_fake
def empty_results(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    cache: Tensor | None = None,
    keep: bool = False,
) -> list[Tensor]:
    """The results' tensors, not filled."""
    batch, width, frames, height, columns = x.shape
    kept, fp8 = checked_cache(x, gamma, bias, residual, cache), torch.float8_e4m3fn
    torch._check(cache is None or cache.dtype is fp8)
    shapes = [(batch, width, CACHED + frames, height + 2, columns + 2), kept]
    layout = torch.channels_last_3d
    made = [torch.empty(s, dtype=fp8, device=x.device, memory_format=layout) for s in shapes]
    total = [torch.empty_like(x, memory_format=layout)] if keep else []
    return [*made, torch.empty((), device=x.device), *total]
