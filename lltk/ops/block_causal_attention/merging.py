"""Block-causal attention by a kernel that takes one run of keys at a time, which is never copied.

A chunk attends to each of its runs by itself. Their results are averaged by the weights exp(lse),
where lse is the logarithm of a run's summed exponentials; see FlashAttention, arXiv 2205.14135. In
the backward pass a run's gradients follow from the whole result and the whole lse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lltk.ops.block_causal_attention.reference import chunks


@dataclass(frozen=True)
class Kernel:
    """Dense attention over [B, H, L, D] operands of any strides, scaled by 1/√D.

    Attributes:
        forward: takes q, k and v; gives the result, and lse as float32 [B, H, L].
        backward: takes the result's gradient, q, k, v, the result and lse; gives the gradients of
            q, k and v.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
    ]


def attend(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_tokens: int,
    teacher_forcing: bool,
    ranks: int,
) -> tuple[Tensor, Tensor]:
    """`reference.block_causal_attention`, and its lse as float32 [B, H, L]."""
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(queries.shape[:3], dtype=torch.float32)
    for own, runs in chunks(q.shape[1], chunk_tokens, teacher_forcing, ranks):
        parts = [
            kernel.forward(queries[:, :, own], keys[:, :, run], values[:, :, run]) for run in runs
        ]
        merged, lse[:, :, own] = _merged(parts)
        out[:, own] = merged.transpose(1, 2)
    return out, lse


def differentiate(
    kernel: Kernel,
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
    """The gradients of q, k and v; those of keys and values are summed in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grads, queries, keys, values, results = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (t.new_zeros(t.shape, dtype=wide) for t in (k, v))
    for own, runs in chunks(q.shape[1], chunk_tokens, teacher_forcing, ranks):
        row = [t[:, :, own] for t in (grads, queries, results, lse)]
        parts = []
        for run in runs:
            part, dkeys, dvalues = kernel.backward(
                row[0], row[1], keys[:, :, run], values[:, :, run], row[2], row[3]
            )
            parts.append(part)
            dk[:, run] += dkeys.transpose(1, 2)
            dv[:, run] += dvalues.transpose(1, 2)
        total = parts[0] if len(parts) == 1 else torch.stack(parts).to(wide).sum(0)
        dq[:, own] = total.transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One attention over the keys of all parts."""
    (out, lse), *others = parts
    if not others:
        return out, lse
    total = torch.stack([each for _, each in parts]).logsumexp(0)
    wide = torch.promote_types(out.dtype, torch.float32)
    summed = sum(each.to(wide) * (own - total).exp()[..., None] for each, own in parts)
    assert isinstance(summed, Tensor)
    return summed.to(out.dtype), total
