"""A gated residual, layer norm, modulation and quantisation to FP8, one after another."""

from __future__ import annotations

from torch import Tensor

from lltk.ops.fp8_quantise_norm.reference import fp8_quantise_norm
from lltk.ops.gated_add.reference import gated_add


def fp8_quantise_add_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + gate · y, and its norm as FP8 rows; the norm is of the sum as rounded.

    Args:
        x, y, gate: see `gated_add`.
        scale, shift, eps: see `fp8_quantise_norm`.

    Returns:
        The sum, of x's shape and dtype, and what `fp8_quantise_norm` makes of it.
    """
    total = gated_add(x, y, gate)
    return (total, *fp8_quantise_norm(total, scale, shift, eps))
