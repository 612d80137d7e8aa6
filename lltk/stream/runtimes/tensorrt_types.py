"""How TensorRT calls lltk's dtypes, and counts the elements of its tensors."""

from __future__ import annotations

import torch

from lltk.graph.contract import TensorSpec

DTYPES = {
    torch.float32: "FLOAT",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "FP8",
    torch.int64: "INT64",
    torch.bool: "BOOL",
    torch.uint8: "FP4",
}
"""TensorRT's names; what lltk holds as bytes are pairs of E2M1 numbers there."""


def tensor_shape(spec: TensorSpec) -> tuple[int, ...]:
    """A tensor's shape as TensorRT counts its elements."""
    if spec.dtype is torch.uint8:
        return (*spec.shape[:-1], 2 * spec.shape[-1])
    return spec.shape
