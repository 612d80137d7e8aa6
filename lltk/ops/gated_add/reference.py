"""A residual scaled by a gate and added."""

from __future__ import annotations

from torch import Tensor


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate · y, computed in float32 and rounded as x is.

    Args:
        x, y: [..., D], R rows in all.
        gate: float32 of G rows of D each, G a divisor of R: one for R / G rows in order; None is 1.

    Returns:
        Of x's shape and dtype, contiguous.
    """
    added = y.float()
    if gate is not None:
        width = x.shape[-1]
        groups = added.reshape(gate.numel() // width, -1, width)
        added = (groups * gate.reshape(-1, 1, width)).view(x.shape)
    return (x.float() + added).to(x.dtype).contiguous()
