"""Block-causal attention through cuDNN; no keys or values are copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lltk.ops.block_causal_attention.merging import Kernel, attend, differentiate
from lltk.ops.cudnn_dtypes import check_attends
from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "cuDNN's attention, run by run of keys, which it does not copy",
    devices=("cuda",),
)
aten = torch.ops.aten


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.view(q.shape[:3])


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of dropout
    made: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_cudnn_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse.contiguous()[..., None],
        unused,
        unused,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        False,
    )
    return made


_KERNEL = Kernel(_forward, _backward)


@torch.library.custom_op("lltk::block_causal_attention_cudnn", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int, teacher_forcing: bool, ranks: int
) -> tuple[Tensor, Tensor]:
    return attend(_KERNEL, q, k, v, chunk_tokens, teacher_forcing, ranks)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int, teacher_forcing: bool, ranks: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("lltk::block_causal_attention_cudnn_backward", mutates_args=())
def _differentiate(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chunk_tokens: int,
    teacher_forcing: bool,
    ranks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return differentiate(_KERNEL, grad, q, k, v, out, lse, chunk_tokens, teacher_forcing, ranks)


@_differentiate.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.others = inputs[3:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_differentiate(grad, *ctx.saved_tensors, *ctx.others), None, None, None)


_attend.register_autograd(_gradients, setup_context=_save)


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int, teacher_forcing: bool, ranks: int = 1
) -> Tensor:
    """`reference.block_causal_attention`; an error where cuDNN cannot run it.

    Raises:
        ValueError: q is neither bfloat16 nor float16.
    """
    check_attends("block_causal_attention", q)
    out: Tensor = _attend(q, k, v, chunk_tokens, teacher_forcing, ranks)[0]
    return out
