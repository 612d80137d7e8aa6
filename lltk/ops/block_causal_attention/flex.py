"""Block-causal attention through FlexAttention: one kernel, masked blocks skipped."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lltk.ops.block_causal_attention.reference import attended
from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "torch's FlexAttention, compiled; skips blocks that are masked",
    devices=("cuda",),
    modules=("triton",),
)

BLOCK = 128
"""Tokens of a FlexAttention block."""

_flex_attention = torch.compile(flex_attention)


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int, teacher_forcing: bool, ranks: int = 1
) -> Tensor:
    """`reference.block_causal_attention` by FlexAttention's compiled kernel; differentiable."""
    blocks = block_mask(q.shape[1], chunk_tokens, teacher_forcing, ranks, q.device)
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    return _flex_attention(queries, keys, values, block_mask=blocks).transpose(1, 2)


def block_mask(
    tokens: int, chunk_tokens: int, teacher_forcing: bool, ranks: int, device: torch.device
) -> BlockMask:
    """The mask as FlexAttention blocks, from chunk borders alone: no L×L matrix is evaluated."""
    chunks = tokens // chunk_tokens
    rows = [
        [column in seen for column in range(chunks)]
        for seen in attended(chunks, teacher_forcing, ranks)
    ]
    allowed = torch.tensor(rows, device=device)
    seen, full = _coverage(allowed, tokens, chunk_tokens)
    partial_count, partial_index = _ordered(seen & ~full)
    full_count, full_index = _ordered(full)

    def token_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed[query // chunk_tokens, key // chunk_tokens]

    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=token_mask,
        seq_lengths=(tokens, tokens),
    )


def _coverage(allowed: Tensor, tokens: int, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """For each pair of blocks, whether any pair of their tokens is allowed, and whether all are."""
    sums = torch.nn.functional.pad(allowed.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    starts = torch.arange(0, tokens, BLOCK, device=allowed.device)
    first = starts // chunk_tokens
    last = (starts + BLOCK - 1).clamp(max=tokens - 1) // chunk_tokens + 1
    top, bottom = first[:, None], last[:, None]
    count = sums[bottom, last] - sums[top, last] - sums[bottom, first] + sums[top, first]
    return count > 0, count == (bottom - top) * (last - first)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Row counts and column indices, the set columns first, with batch and head axes of 1."""
    count = blocks.sum(-1, dtype=torch.int32)
    index = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return count[None, None], index[None, None].contiguous()
