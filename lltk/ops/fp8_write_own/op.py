"""``lltk::fp8_write_own``: what attention puts a chunk's own keys and values in place with."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_write_own import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")


fp8_write_own = torch.library.custom_op(
    "lltk::fp8_write_own", reference.fp8_write_own, mutates_args=("k_decoded", "v_decoded")
)
"""See `reference.fp8_write_own`."""


@fp8_write_own.register_fake
def _(
    k_decoded: Tensor,
    v_decoded: Tensor,
    v_largest: Tensor,
    k: Tensor,
    v: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    table: Tensor,
) -> Tensor:
    torch._check(table.shape[0] + 1 == k_decoded.shape[1])
    for decoded, own in ((k_decoded, k), (v_decoded, v)):
        torch._check((decoded.shape[0], *decoded.shape[2:]) == tuple(own.shape))
    return v_largest.new_empty(())
