"""Attention of a chunk over its own keys and the committed pages."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(own: Tensor, pages: Tensor, table: Tensor) -> Tensor:
    """Keys (or values) a chunk attends to: the listed pages, as constants, then its own.

    Args:
        own: [B, L, H, D].
        pages: [B, P, T, H, D].
        table: int64 [N], distinct pages, in any order.

    Returns:
        [B, N * T + L, H, D] in ``own``'s dtype.
    """
    committed = pages.detach().index_select(1, table).flatten(1, 2).to(own.dtype)
    return torch.cat([committed, own], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v per head, summed in float32 or wider; all are [B, L, H, D]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("blhd,bmhd->bhlm", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    out = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v.to(wide))
    return out.to(q.dtype).contiguous()


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention`, with P = softmax(S), S = q kᵀ / √D.

    dV = Pᵀ dO;  dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O));  dQ = dS K / √D;  dK = dSᵀ Q / √D.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_, q_, k_, v_ = (t.to(wide) for t in (grad, q, k, v))
    scale = q.shape[-1] ** -0.5
    p = (torch.einsum("blhd,bmhd->bhlm", q_, k_) * scale).softmax(-1)
    dp = torch.einsum("blhd,bmhd->bhlm", grad_, v_)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bhlm,bmhd->blhd", ds, k_)
    dk = torch.einsum("bhlm,blhd->bmhd", ds, q_)
    dv = torch.einsum("bhlm,blhd->bmhd", p, grad_)
    return (
        dq.to(q.dtype).contiguous(),
        dk.to(k.dtype).contiguous(),
        dv.to(v.dtype).contiguous(),
    )


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor
) -> Tensor:
    """Attend to the chunk's own keys and the pages that ``table`` lists.

    Args:
        q, k, v: [B, L, H, D], this chunk's.
        k_pages, v_pages: [B, P, T, H, D], the arenas; keys carry their positions.
        table: int64 [N], distinct committed pages; their order does not matter, N may be 0.

    Returns:
        [B, L, H, D] in ``q``'s dtype.
    """
    return attention(q, gather(k, k_pages, table), gather(v, v_pages, table))


def paged_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v; committed pages are constants."""
    own = k.shape[1]
    dq, dk, dv = attention_backward(grad, q, gather(k, k_pages, table), gather(v, v_pages, table))
    return dq, dk[:, -own:].contiguous(), dv[:, -own:].contiguous()
