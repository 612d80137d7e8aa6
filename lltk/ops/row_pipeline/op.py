"""``lltk::row_pipeline``; no gradient flows through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_rows import new_fp8
from lltk.ops.nvfp4_quantise.op import new_nvfp4
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.row_pipeline import reference

DECLARATION = Declaration(Exactness.REFERENCE, "float32 in torch")

row_pipeline = torch.library.custom_op(
    "lltk::row_pipeline", reference.row_pipeline, mutates_args=()
)


@row_pipeline.register_fake
def new_results(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
    activation: str | None = None,
    to: str = "plain",
    rule: str = "none",
    keep_sum: bool = False,
) -> list[Tensor]:
    """Empty tensors for the results.

    Raises:
        RuntimeError: the arguments do not fit together.
    """
    width = x.shape[-1]
    torch._check(y is None or y.shape == x.shape)
    torch._check(y is not None or (gate is None and not keep_sum))
    torch._check((scale is None) == (eps is None) and (shift is None or scale is not None))
    for row in (gate, scale, shift):
        torch._check(row is None or (row.shape[-1] == width and x.numel() % row.numel() == 0))
    torch._check(scale is None or shift is None or scale.shape == shift.shape)
    torch._check(activation in (None, "gelu") and to in _FORMS)
    torch._check(rule == "none" or to == "nvfp4")
    torch._check(width % BLOCK == 0 or to != "nvfp4")
    # An op may not return its input, nor one tensor twice.
    changes = scale is not None or activation is not None or to != "plain"
    torch._check(changes or (y is not None and not keep_sum))
    return [*_FORMS[to](x), _new_plain(x)[0]] if keep_sum else [*_FORMS[to](x)]


def _new_plain(x: Tensor) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape),)


_FORMS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "plain": _new_plain,
    "fp8": new_fp8,
    "e4m3": lambda x: new_fp8(x)[:1],
    "nvfp4": new_nvfp4,
}
