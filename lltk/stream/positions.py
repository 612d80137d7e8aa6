"""Where latent frames stand in time, for RoPE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lltk.graph.geometry import Geometry


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


def bounded_positions(shots: Sequence[int], chunk: int, offset: float = 0.0) -> Tensor:
    """Positions of the chunks that are seen, as though they were the whole video.

    The gaps that evicted chunks have left are closed: the sinks come first, then the window, and
    only shots that are seen count (StreamingLLM's positions within the cache, arXiv 2309.17453).
    None is larger than `largest_position`.

    Args:
        shots: the shot of each chunk that is seen, in the video's order, the chunk in flight last.
        chunk, offset: see `frame_positions`.

    Returns:
        float64 [len(shots) * C].
    """
    numbers = {shot: number for number, shot in enumerate(sorted(set(shots)))}
    return frame_positions([numbers[shot] for shot in shots], chunk, offset)


def largest_position(geometry: Geometry, offset: float = 0.0) -> float:
    """The largest of `bounded_positions` in any video: W − 1, and φ for each page after the first.

    Args:
        geometry: of the stream.
        offset: φ, in latent frames, at least 0.
    """
    return geometry.window - 1 + offset * (geometry.pages - 1)
