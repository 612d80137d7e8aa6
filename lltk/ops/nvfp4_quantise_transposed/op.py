"""``lltk::nvfp4_quantise_transposed``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.nvfp4_quantise_transposed import reference
from lltk.ops.nvfp4_quantise_transposed.reference import padded

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


@torch.library.custom_op("lltk::nvfp4_quantise_transposed", mutates_args=())
def nvfp4_quantise_transposed(
    x: Tensor,
    signs: list[int],
    rule: str = "none",
    seed: Tensor | None = None,
    stream: int = 0,
    largest: Tensor | None = None,
    run: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nvfp4_quantise_transposed`."""
    return reference.nvfp4_quantise_transposed(x, signs, rule, seed, stream, largest, run)


@nvfp4_quantise_transposed.register_fake
def new_transposed(
    x: Tensor, signs: list[int], *_: object, **__: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the results; the arguments that are not named change no shape."""
    columns = x.shape[-1]
    rows = padded(x.numel() // columns, signs)
    return (
        x.new_empty((columns, rows // 2), dtype=torch.uint8),
        x.new_empty((columns, rows // BLOCK), dtype=torch.float8_e4m3fn),
        x.new_empty((), dtype=torch.float32),
    )
