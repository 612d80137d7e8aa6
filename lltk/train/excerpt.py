"""What a stream sees late in a video, out of a clip: sinks, and the chunks of just before."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.graph.geometry import Geometry
from lltk.train.data import Batch

_SINGLE = 2
"""Most chunks that stand alone: a global sink and a shot's."""


def excerpt(batch: Batch, geometry: Geometry, gap: float = 1.0) -> Batch:
    """As many chunks as the geometry has, the same of all clips, and their positions.

    Up to two single chunks, of which one is the first, then consecutive ones; their number and
    places are uniform. A leap between them is longer in positions than in the clips by up to `gap`
    latent frames, the logarithm of one more than which is uniform.

    Args:
        batch: ``latents`` [B, C, F, h, w]; per chunk ``text`` [B, N, S, E] and ``opens`` [B, N];
            per frame ``valid`` [B, F]. Those that are there.
        geometry: of what trains.
        gap: at least 1, for nothing.

    Returns:
        The same of fewer chunks, with ``positions``, float64 [F].

    Raises:
        ValueError: the clips are shorter than the geometry's, or not of whole chunks.
    """
    chunk, chunks, frames = geometry.chunk, geometry.chunks, batch.tensors["latents"].shape[2]
    if frames < geometry.frames or frames % chunk:
        raise ValueError(
            f"clips of {frames} latent frames: the program is for {geometry.frames}, in chunks of "
            f"{chunk}; set train.data.frames to a multiple of {chunk} that is no less"
        )
    if frames == geometry.frames:
        positions = torch.arange(frames, dtype=torch.float64)
        return replace(batch, tensors={**batch.tensors, "positions": positions})
    seen = _seen(batch, chunks, frames // chunk)
    places = (seen[:, None] * chunk + torch.arange(chunk)).flatten()
    length = batch.uniform("gap", chunks)[0].double()
    extra = (gap**length - 1).floor() * F.pad(seen.diff() > 1, (1, 0))
    positions = places.double() + extra.cumsum(0).repeat_interleave(chunk)
    axes = {"latents": (2, places), "valid": (1, places), "text": (1, seen), "opens": (1, seen)}
    tensors = {"positions": positions}
    for name, tensor in batch.tensors.items():
        axis, chosen = axes[name]
        tensors[name] = tensor.index_select(axis, chosen.to(tensor.device))
    return replace(batch, tensors=tensors)


def leaps(positions: Tensor, chunk: int) -> Tensor:
    """Chunks that do not follow the one before, bool [N], by the positions [F] of their frames."""
    return F.pad(positions[::chunk].diff() > chunk, (1, 0))


def _seen(batch: Batch, chunks: int, given: int) -> Tensor:
    """Numbers of an excerpt's chunks, rising, int64 [N], from clips of more chunks."""
    draws = batch.uniform("excerpt", 3)[0].tolist()
    alone = int(draws[0] * min(_SINGLE + 1, chunks))
    if not alone:
        return torch.arange(chunks)
    begin = alone + int(draws[1] * (given - chunks + 1))
    single = [0, 1 + int(draws[2] * (begin - 1))][:alone]
    return torch.tensor([*single, *range(begin, begin + chunks - alone)])
