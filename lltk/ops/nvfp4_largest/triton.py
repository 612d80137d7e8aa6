"""The kernels that find what to scale by, without those that quantise."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.nvfp4_quantise.triton import find_largest
from lltk.ops.nvfp4_quantise_transposed.triton import find_largest_transformed

DECLARATION = Declaration(
    Exactness.BITWISE,
    "arithmetic",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)


def nvfp4_largest(x: Tensor, signs: list[int]) -> Tensor:
    """See `reference.nvfp4_largest`, which it equals bit by bit, but for which NaN it is.

    Raises:
        ValueError: x is of a dtype that kernels do not read, or there are more than 64 signs.
    """
    x = x.flatten(0, -2).contiguous()
    found = x.new_zeros(2, dtype=torch.float32)
    find_largest(x, found[0])
    find_largest_transformed(x, signs, found[1])
    return found
