"""``lltk::nvfp4_dequantise``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.nvfp4_backends import implementation


@torch.library.custom_op("lltk::nvfp4_dequantise", mutates_args=())
def nvfp4_dequantise(
    codes: Tensor,
    scales: Tensor,
    decode_scale: Tensor,
    dtype: torch.dtype = torch.float32,
    backend: str = "reference",
) -> Tensor:
    """See `reference.nvfp4_dequantise`."""
    run = implementation("nvfp4_dequantise", backend)
    found: Tensor = run(codes, scales, decode_scale, dtype)
    return found


@nvfp4_dequantise.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    decode_scale: Tensor,
    dtype: torch.dtype = torch.float32,
    backend: str = "reference",
) -> Tensor:
    *rows, half = codes.shape
    return codes.new_empty((*rows, 2 * half), dtype=dtype)


OVERLOAD = torch.ops.lltk.nvfp4_dequantise.default
"""The op as a graph node's target."""
