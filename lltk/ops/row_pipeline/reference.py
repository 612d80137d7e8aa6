"""Residual, norm, activation and quantisation of each row, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lltk.ops.floats import round_e4m3
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.nvfp4_quantise.reference import nvfp4_quantise


def row_pipeline(
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
    """Send each row through the steps that the arguments ask for, and write it in one form.

    The steps, in this order. A step that is not asked for is left out:

    1. residual, where ``y`` is given: x + gate · y, or x + y without a gate;
    2. norm, where ``scale`` and ``eps`` are given: (x − mean) / √(variance + eps) · scale + shift,
       with the mean and the biased variance of the row; without ``shift`` it is an RMS norm,
       x / √(mean of x² + eps) · scale;
    3. activation, where it is ``"gelu"``: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))
       (arXiv 1606.08415, section 2);
    4. quantisation, where ``to`` names a form.

    Steps compute in float32, and the result of each of the first three is rounded to x's dtype.
    For example ``row_pipeline(x, y=y, gate=gate, to="fp8", keep_sum=True)`` adds a gated residual
    and returns the sum's FP8 values, their scales and the sum.

    Args:
        x, y: [..., D], R rows in all.
        gate, scale, shift: float32 of G rows of D each. G divides R: the first row is for the first
            R / G rows of x, and so on. One row [D] is for all of x. The scale of an RMS norm may
            have x's dtype.
        eps: what the norm adds to the variance.
        activation: ``"gelu"`` or None.
        to: ``"plain"`` for x's dtype; ``"fp8"`` for what `fp8_quantise` returns; ``"e4m3"`` for
            the nearest E4M3 values, without scales; ``"nvfp4"`` for what `nvfp4_quantise` returns
            of blocks 1×16, for which D is a multiple of 16.
        rule: of `nvfp4_quantise`.
        keep_sum: whether the residual's sum is a result too.

    Returns:
        The tensors of the form, then the sum if it is kept; contiguous.
    """
    if y is not None:
        x = _sum(x, y, gate)
    total = x
    if scale is not None and eps is not None:
        x = _norm(x, scale, shift, eps)
    if activation == "gelu":
        x = F.gelu(x, approximate="tanh")
    x = x.contiguous()
    written: Sequence[Tensor] = (x,)
    if to == "fp8":
        written = fp8_quantise(x)
    elif to == "e4m3":
        written = (round_e4m3(x),)
    elif to == "nvfp4":
        written = nvfp4_quantise(x, 1, rule)
    return [*written, total] if keep_sum else [*written]


def _sum(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    added = y.float()
    if gate is not None:
        width = x.shape[-1]
        groups = added.reshape(gate.numel() // width, -1, width)
        added = (groups * gate.reshape(-1, 1, width)).view(x.shape)
    return (x.float() + added).to(x.dtype).contiguous()


def _norm(x: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    width = x.shape[-1]
    norm = F.rms_norm if shift is None else F.layer_norm
    rows = norm(x.float(), (width,), eps=eps).reshape(-1, width)
    changed = rows.unflatten(0, (scale.numel() // width, -1)) * scale.reshape(-1, 1, width)
    if shift is not None:
        changed = changed + shift.reshape(-1, 1, width)
    return changed.view(x.shape).to(x.dtype)
