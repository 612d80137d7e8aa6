"""The result of each exchange on one rank, from all ranks' inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tokens_to_heads(shards: Sequence[Tensor], rank: int) -> Tensor:
    """All ranks' tokens, in the order of ranks, of the heads that are this rank's.

    Args:
        shards: [B, L/n, H, …] of each of n ranks: its tokens of every head.
        rank: whose result.

    Returns:
        [B, L, H/n, …].
    """
    return torch.cat(list(shards), dim=1).chunk(len(shards), dim=2)[rank]


def heads_to_tokens(shards: Sequence[Tensor], rank: int) -> Tensor:
    """All ranks' heads of the tokens that are this rank's; undoes `tokens_to_heads`.

    Args:
        shards: [B, L, H/n, …] of each of n ranks: its heads of every token.
        rank: whose result.

    Returns:
        [B, L/n, H, …].
    """
    return torch.cat(list(shards), dim=2).chunk(len(shards), dim=1)[rank]
