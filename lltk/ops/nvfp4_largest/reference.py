"""The largest magnitudes of a tensor and of its transform."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.nvfp4_quantise.reference import amax
from lltk.ops.nvfp4_quantise_transposed.reference import transformed


def nvfp4_largest(x: Tensor, signs: list[int]) -> Tensor:
    """What `nvfp4_quantise` and `nvfp4_quantise_transposed` of a tensor scale it by.

    Args:
        x: [..., K].
        signs: of the Hadamard transform along the rows; none for no transform.

    Returns:
        float32 [2]: the largest magnitude of x, and that of its transform. Where an element is not
        finite, neither are they.
    """
    return torch.stack([amax(x), amax(transformed(x, signs))])
