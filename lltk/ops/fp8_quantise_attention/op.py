"""``lltk::fp8_quantise_attention``; no gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise_attention import reference
from lltk.ops.fp8_rows import new_fp8
from lltk.ops.implementations import overload

DECLARATION = Declaration(
    Exactness.REFERENCE, "nvfp4_paged_attention's reference, then fp8_quantise's"
)


fp8_quantise_attention = torch.library.custom_op(
    "lltk::fp8_quantise_attention", reference.fp8_quantise_attention, mutates_args=()
)
"""See `reference.fp8_quantise_attention`."""


@fp8_quantise_attention.register_fake
def _(q: Tensor, k: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    attend = overload("nvfp4_paged_attention")
    return new_fp8(attend(q, k, *rest[: len(attend._schema.arguments) - 2]).flatten(2))
