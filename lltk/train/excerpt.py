"""Excerpts of a clip that look like what a stream sees late in a video."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.graph.geometry import Geometry
from lltk.train.data import Batch

_SINGLE = 2
"""Most single chunks in an excerpt: they stand for the global sink and the shot's sink."""


def excerpt(batch: Batch, geometry: Geometry, gap: float = 1.0) -> Batch:
    """Choose as many chunks of the clips as the geometry has, and give them positions.

    Late in a video a stream sees its sinks and the chunks just before. An excerpt likewise has one
    or two single chunks, the clip's first among them, and then consecutive chunks: 4 of 9 chunks
    may be 0, 2, 6, 7. An excerpt without single chunks is the clip's beginning: 0, 1, 2, 3. The
    number of single chunks and all places are drawn uniformly, once for all clips of the batch.

    A position is a frame's number in its clip. Where an excerpt leaps over chunks (0 → 2 and 2 → 6
    in the example), e latent frames are added to the leap, as if the video were longer than the
    clip: e = ⌊gap^u⌋ − 1 with u uniform in [0, 1). So short and long additions are equally likely
    on a logarithmic scale.

    Args:
        batch: ``latents`` [B, C, F, h, w]; and, where it has them, ``text`` [B, N, S, E] and
            ``opens`` [B, N] for each chunk, and ``valid`` [B, F] for each frame.
        geometry: has the chunk's length and the number of chunks to choose.
        gap: bounds e, which is less than ``gap``. With 1 nothing is added.

    Returns:
        The batch with the chosen chunks alone, and their ``positions``, float64 [F]. Clips that are
        no longer than the geometry's are returned whole.

    Raises:
        ValueError: the clips are shorter than the geometry's, or not a whole number of chunks.
    """
    chunk, chunks, frames = geometry.chunk, geometry.chunks, batch.tensors["latents"].shape[2]
    if frames < geometry.frames or frames % chunk:
        raise ValueError(
            f"clips of {frames} latent frames: the program is for {geometry.frames}, in chunks of "
            f"{chunk}; set train.data.frames to a multiple of {chunk} that is at least "
            f"{geometry.frames}"
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
    """Which chunks do not directly follow the one before, bool [N].

    Args:
        positions: of all frames, [F].
        chunk: frames in a chunk.
    """
    return F.pad(positions[::chunk].diff() > chunk, (1, 0))


def _seen(batch: Batch, chunks: int, given: int) -> Tensor:
    """The numbers of an excerpt's chunks, rising, int64 [N].

    Args:
        batch: seeds the draw.
        chunks: how many to choose.
        given: how many the clips have, more than ``chunks``.
    """
    draws = batch.uniform("excerpt", 3)[0].tolist()
    alone = int(draws[0] * min(_SINGLE + 1, chunks))
    if not alone:
        return torch.arange(chunks)
    begin = alone + int(draws[1] * (given - chunks + 1))
    single = [0, 1 + int(draws[2] * (begin - 1))][:alone]
    return torch.tensor([*single, *range(begin, begin + chunks - alone)])
