"""GELU and quantisation to FP8, one after another."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lltk.ops.fp8_quantise.reference import fp8_quantise


def fp8_quantise_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU by tanh, rounded as x is, as FP8 rows.

    gelu(x) = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) (arXiv 1606.08415, 2).

    Args:
        x: [..., K], any floating dtype.

    Returns:
        What `fp8_quantise` makes of it.
    """
    return fp8_quantise(F.gelu(x, approximate="tanh"))
