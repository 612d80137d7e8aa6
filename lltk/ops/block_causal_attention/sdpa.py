"""Block-causal attention as one dense scaled_dot_product_attention a chunk; differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lltk.ops.block_causal_attention.reference import chunks
from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(Exactness.ROUNDING, "torch's attention, chunk by chunk", default=True)


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int, teacher_forcing: bool, ranks: int = 1
) -> Tensor:
    """`reference.block_causal_attention`; every chunk attends densely to the keys it may see."""
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    parts = [
        F.scaled_dot_product_attention(
            queries[:, :, own],
            torch.cat([keys[:, :, run] for run in runs], dim=2),
            torch.cat([values[:, :, run] for run in runs], dim=2),
        )
        for own, runs in chunks(q.shape[1], chunk_tokens, teacher_forcing, ranks)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)
