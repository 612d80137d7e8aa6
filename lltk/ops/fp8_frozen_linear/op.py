"""``lltk::fp8_frozen_linear``: a product with a weight in FP8 that gradients pass.

Forward it is `fp8_matmul`. The gradient of x is dy · W with the decoded weight, as if x had not
been rounded. W and the bias have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import overload

DECLARATION = Declaration(Exactness.REFERENCE, "the references of its two ops")


def compose(name: str, parts: Iterable[Callable[..., Any]]) -> torch._ops.OpOverload:
    """An implementation, as an operator of torch's with a gradient.

    Args:
        name: of the operator, in ``lltk::``.
        parts: implementations of `fp8_matmul` and `fp8_dequantise`.
    """
    matmul, dequantise = parts

    @torch.library.custom_op(f"lltk::{name}", mutates_args=())
    def fp8_frozen_linear(
        x: Tensor,
        x_values: Tensor,
        x_scales: Tensor,
        values: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """x · Wᵀ + bias from FP8 operands.

        Args:
            x: [..., K]; only its shape, dtype and gradient matter.
            x_values, x_scales: x in FP8, with a scale a row.
            values, scales: W in FP8, [N, K], with scales [N, 1].
            bias: [N].
            dtype: of the result.

        Returns:
            [..., N].
        """
        made: Tensor = matmul(x_values, x_scales, values, scales, bias, dtype)
        return made

    @fp8_frozen_linear.register_fake
    def _(x: Tensor, *rest: Any) -> Tensor:
        values, dtype = rest[2], rest[5]
        torch._check(x.shape[-1] == values.shape[1])
        return x.new_empty((*x.shape[:-1], values.shape[0]), dtype=dtype)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = (part[None, :, None] for part in ctx.saved_tensors)
        weight = dequantise(*rows, grad.dtype)[0, :, 0]
        return ((grad @ weight).to(ctx.dtype), *[None] * 6)

    fp8_frozen_linear.register_autograd(backward, setup_context=_save)
    found: torch._ops.OpOverload = getattr(torch.ops.lltk, name).default
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, values, scales, _, _ = inputs
    ctx.save_for_backward(values, scales)
    ctx.dtype = x.dtype


fp8_frozen_linear = compose("fp8_frozen_linear", map(overload, ("fp8_matmul", "fp8_dequantise")))
