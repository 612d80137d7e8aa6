"""``lltk::nvfp4_linear``: a product whose gradients are NVFP4 products too.

| product | operands |
|---|---|
| forward y = x·Wᵀ | x in 1×16 blocks, W in 16×16 tiles, to nearest |
| dgrad dx = dy·W | dy in 1×16 blocks, stochastically; the same values of W |
| wgrad dW = dyᵀ·x | dyᵀ and xᵀ transformed along tokens; dyᵀ stochastically, xᵀ to nearest |

The graph shows what is quantised when: nodes before this one quantise x and W, and the gradient's
formula is written in `lltk::` ops. Where several ranks share x, the largest magnitude of a
gradient is exchanged, and random numbers go by a row's place in the whole.

x and W themselves are arguments only so that they get gradients. Of the activation, backward keeps
nothing but the 4-bit transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import overload
from lltk.parallel.exchange import all_max

DECLARATION = Declaration(Exactness.REFERENCE, "the references of its three ops")


def compose(name: str, parts: Iterable[Callable[..., Any]]) -> torch._ops.OpOverload:
    """An implementation, as an operator of torch's with a gradient.

    Args:
        name: of the operator, in ``lltk::``.
        parts: implementations of `nvfp4_quantise`, `nvfp4_quantise_transposed`, `nvfp4_largest` and
            `nvfp4_matmul`.
    """
    quantise, quantise_transposed, find_largest, matmul = parts

    @torch.library.custom_op(f"lltk::{name}", mutates_args=())
    def nvfp4_linear(
        x: Tensor,
        weight: Tensor,
        x_codes: Tensor,
        x_scales: Tensor,
        x_scale: Tensor,
        xt_codes: Tensor,
        xt_scales: Tensor,
        xt_scale: Tensor,
        w_codes: Tensor,
        w_scales: Tensor,
        w_scale: Tensor,
        wt_codes: Tensor,
        wt_scales: Tensor,
        seed: Tensor,
        stream: int,
        stochastic: bool,
        rule: str,
        signs: list[int],
        run: int = 0,
        size: int = 1,
        group: str = "",
    ) -> Tensor:
        """x · Wᵀ from NVFP4 operands.

        Args:
            x: [..., K], and weight: [N, K]; only their shapes, dtypes and gradients matter.
            x_codes, x_scales, x_scale: x in NVFP4.
            xt_codes, xt_scales, xt_scale: x as `nvfp4_quantise_transposed` has it, [K, L].
            w_codes, w_scales, w_scale: W in NVFP4, of 16×16 tiles.
            wt_codes, wt_scales: its transpose, [K, N].
            seed: int64 [2], or [4] of a rank, of stochastic rounding; see
                `lltk.ops.philox.uniform`.
            stream: this layer's first random sequence; it uses two.
            stochastic: whether output gradients are rounded stochastically.
            rule: Four Over Six rule of output gradients.
            signs: of the Hadamard transform; none for no transform.
            run: how many of x's rows follow one another in what several ranks share; 0 if none do.
            size, group: of these ranks, as of `lltk.parallel.exchange`.

        Returns:
            [..., N] in x's dtype.
        """
        made: Tensor = matmul(x_codes, x_scales, x_scale, w_codes, w_scales, w_scale, x.dtype)
        return made

    @nvfp4_linear.register_fake
    def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        torch._check(x.shape[-1] == weight.shape[1])
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *xt, wt_codes, wt_scales, w_scale, seed = ctx.saved_tensors
        random = seed if ctx.stochastic else None
        rows = turned = dx = dw = None
        if ctx.size > 1:
            largest = find_largest(grad, ctx.signs)
            rows, turned = all_max(largest, ctx.size, ctx.group).unbind()
        if ctx.needs_input_grad[0]:
            operand = quantise(grad, 1, ctx.rule, random, ctx.stream, rows, ctx.run)
            dx = matmul(*operand, wt_codes, wt_scales, w_scale, grad.dtype)[..., : ctx.width]
        if ctx.needs_input_grad[1]:
            operand = quantise_transposed(
                grad, ctx.signs, ctx.rule, random, ctx.stream + 1, turned, ctx.run
            )
            dw = matmul(*operand, *xt, ctx.weight_dtype)
        return (dx, dw, *[None] * 19)

    nvfp4_linear.register_autograd(backward, setup_context=_save)
    found: torch._ops.OpOverload = getattr(torch.ops.lltk, name).default
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, _, *xt, _, _, w_scale, wt_codes, wt_scales, seed = inputs[:14]
    ctx.save_for_backward(*xt, wt_codes, wt_scales, w_scale, seed)
    ctx.stream, ctx.stochastic, ctx.rule, ctx.signs, ctx.run, ctx.size, ctx.group = inputs[14:]
    ctx.width, ctx.weight_dtype = x.shape[-1], weight.dtype


_PARTS = ("nvfp4_quantise", "nvfp4_quantise_transposed", "nvfp4_largest", "nvfp4_matmul")
nvfp4_linear = compose("nvfp4_linear", map(overload, _PARTS))
