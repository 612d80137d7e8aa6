"""Block-causal attention over whole clips, for scoring and teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lltk.ops.paged_attention.reference import attention, attention_backward


def attended(chunks: int, teacher_forcing: bool, ranks: int = 1) -> list[list[int]]:
    """The chunks that each chunk of the sequence attends to.

    Without teacher forcing chunk i attends to chunks ≤ i. With it the sequence holds every chunk
    twice, as [clean; noisy], or as [clean; noisy] of each rank's chunks in turn: clean i attends to
    clean ≤ i, noisy i to clean < i and to itself.
    """
    if not teacher_forcing:
        return [list(range(i + 1)) for i in range(chunks)]
    own = chunks // (2 * ranks)
    clean = [2 * own * rank + i for rank in range(ranks) for i in range(own)]
    seen: list[list[int]] = [[] for _ in range(chunks)]
    for i, place in enumerate(clean):
        seen[place] = clean[: i + 1]
        seen[place + own] = [*clean[:i], place + own]
    return seen


def spans(seen: list[int], chunk_tokens: int) -> list[slice]:
    """Token ranges of runs of neighbouring chunks."""
    runs: list[slice] = []
    for chunk in seen:
        start, stop = chunk * chunk_tokens, (chunk + 1) * chunk_tokens
        if runs and runs[-1].stop == start:
            start = runs.pop().start
        runs.append(slice(start, stop))
    return runs


def chunks(
    tokens: int, chunk_tokens: int, teacher_forcing: bool, ranks: int
) -> Iterator[tuple[slice, list[slice]]]:
    """Each chunk's own tokens, and the ranges of tokens that it attends to."""
    for row, seen in enumerate(attended(tokens // chunk_tokens, teacher_forcing, ranks)):
        yield slice(row * chunk_tokens, (row + 1) * chunk_tokens), spans(seen, chunk_tokens)


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int, teacher_forcing: bool, ranks: int = 1
) -> Tensor:
    """softmax(q kᵀ / √D) v over the chunks `attended`; no L×L matrix is held.

    Args:
        q, k, v: [B, L, H, D]; L is a whole number of chunks (with teacher forcing the same number
            for every rank and for clean and noisy).
        chunk_tokens: tokens of a chunk.
        teacher_forcing: whether the sequence holds chunks clean and noisy.
        ranks: with teacher forcing, how many [clean; noisy] follow each other, each of consecutive
            chunks: what an exchange among so many ranks gives.

    Returns:
        [B, L, H, D] in ``q``'s dtype.
    """
    parts = []
    for own, runs in chunks(q.shape[1], chunk_tokens, teacher_forcing, ranks):
        keys, values = (torch.cat([t[:, run] for run in runs], dim=1) for t in (k, v))
        parts.append(attention(q[:, own], keys, values))
    return torch.cat(parts, dim=1)


def block_causal_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_tokens: int,
    teacher_forcing: bool,
    ranks: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `block_causal_attention`, summed over chunks in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_, q_, k_, v_ = (t.to(wide) for t in (grad, q, k, v))
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q_, k_, v_))
    for own, runs in chunks(q.shape[1], chunk_tokens, teacher_forcing, ranks):
        keys, values = (torch.cat([t[:, run] for run in runs], dim=1) for t in (k_, v_))
        dq[:, own], dkeys, dvalues = attention_backward(grad_[:, own], q_[:, own], keys, values)
        sizes = [run.stop - run.start for run in runs]
        for total, part in ((dk, dkeys), (dv, dvalues)):
            for run, piece in zip(runs, part.split(sizes, dim=1), strict=True):
                total[:, run] += piece
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
