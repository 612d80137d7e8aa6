"""Gradients of attention, as ops that can be seen in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def add_gradients(
    attention: CustomOpDef, formula: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> CustomOpDef:
    """Give attention the gradients of q, k and v, by an op of its own.

    Args:
        attention: an op whose first operands are q, k and v. Operands that are no tensors are its
            last ones.
        formula: takes the result's gradient and then what ``attention`` takes, and returns the
            three gradients. The new op has its name.

    Returns:
        The new op.
    """
    backward = torch.library.custom_op(f"lltk::{formula.__name__}", formula, mutates_args=())

    @backward.register_fake
    def _(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [each for each in inputs if each is None or isinstance(each, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = inputs[len(tensors) :]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands = (*ctx.saved_tensors, *ctx.others)
        return (*backward(grad, *operands), *[None] * (len(operands) - 3))

    attention.register_autograd(differentiate, setup_context=save)
    return backward
