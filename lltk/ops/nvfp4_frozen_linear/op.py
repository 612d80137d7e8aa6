"""``lltk::nvfp4_frozen_linear``: a product with a weight in NVFP4 that gradients pass.

Forward it is `nvfp4_matmul`. The gradient of x is dy · W with the decoded weight, as if x had not
been rounded. W itself has none.
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
        parts: implementations of `nvfp4_matmul` and `nvfp4_dequantise`.
    """
    matmul, dequantise = parts

    @torch.library.custom_op(f"lltk::{name}", mutates_args=())
    def nvfp4_frozen_linear(
        x: Tensor,
        x_codes: Tensor,
        x_scales: Tensor,
        x_scale: Tensor,
        codes: Tensor,
        scales: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """x · Wᵀ from NVFP4 operands.

        Args:
            x: [..., K]; only its shape, dtype and gradient matter.
            x_codes, x_scales, x_scale: x in NVFP4.
            codes, scales, scale: W in NVFP4, [N, K], with K padded to whole blocks.
            dtype: of the result.

        Returns:
            [..., N].
        """
        made: Tensor = matmul(x_codes, x_scales, x_scale, codes, scales, scale, dtype)
        return made

    @nvfp4_frozen_linear.register_fake
    def _(x: Tensor, *rest: Any) -> Tensor:
        codes, dtype = rest[3], rest[6]
        torch._check(x.shape[-1] <= 2 * codes.shape[1])
        return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=dtype)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = dequantise(*ctx.saved_tensors, grad.dtype)[:, : ctx.width]
        return ((grad @ weight).to(ctx.dtype), *[None] * 7)

    nvfp4_frozen_linear.register_autograd(backward, setup_context=_save)
    found: torch._ops.OpOverload = getattr(torch.ops.lltk, name).default
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, _, *weight, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.width, ctx.dtype = x.shape[-1], x.dtype


nvfp4_frozen_linear = compose(
    "nvfp4_frozen_linear", map(overload, ("nvfp4_matmul", "nvfp4_dequantise"))
)
