"""Where latent frames stand in time, for RoPE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def frame_positions(
    shots: Sequence[int], chunk: int, offset: float = 0.0, first: int = 0
) -> Tensor:
    """Absolute positions of consecutive chunks' frames, shifted at every cut.

    Frame f of shot k stands at ``f + offset * k``; f counts from the video's first latent frame
    (LongLive's multi-shot RoPE offset).

    Args:
        shots: the shot of each chunk, from 0.
        chunk: C, latent frames a chunk.
        offset: φ, in latent frames; it may be fractional.
        first: index in the video of the first of these chunks.

    Returns:
        float64 [len(shots) * C].
    """
    frames = torch.arange(len(shots) * chunk, dtype=torch.float64) + first * chunk
    return frames + offset * torch.tensor(shots, dtype=torch.float64).repeat_interleave(chunk)
