"""Shapes and dtypes of tensors, and a graph's contract: its inputs and outputs by name."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, value: Tensor) -> TensorSpec:
        return cls(tuple(int(size) for size in value.shape), value.dtype)


@dataclass(frozen=True)
class Contract:
    """Inputs and outputs of a graph by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
