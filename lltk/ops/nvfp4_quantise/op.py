"""``lltk::nvfp4_quantise``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_quantise import reference
from lltk.ops.nvfp4_quantise.reference import BLOCK

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


@torch.library.custom_op("lltk::nvfp4_quantise", mutates_args=())
def nvfp4_quantise(
    x: Tensor,
    tile: int = 1,
    rule: str = "none",
    seed: Tensor | None = None,
    stream: int = 0,
    largest: Tensor | None = None,
    run: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nvfp4_quantise`; one decode scale for all of ``x``.

    Where ranks share a tensor of which x is a part, ``largest``, float32 [], is that of the whole
    tensor, and ``run`` is the number of x's rows that follow one another in it.
    """
    width = -(-x.shape[-1] // BLOCK) * BLOCK
    return reference.nvfp4_quantise(x, tile, rule, seed, stream, largest, run=run * width)


@nvfp4_quantise.register_fake
def new_nvfp4(x: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `nvfp4_quantise` returns; its other arguments change no shape."""
    *rows, width = x.shape
    blocks = (width + BLOCK - 1) // BLOCK
    return (
        x.new_empty((*rows, blocks * BLOCK // 2), dtype=torch.uint8),
        x.new_empty((*rows, blocks), dtype=torch.float8_e4m3fn),
        x.new_empty((), dtype=torch.float32),
    )
