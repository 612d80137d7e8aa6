"""Encoding a video on several ranks at once: together, no frame of it twice, or each by itself.

Together (`encode_shared`): a causal convolution sees the frames before those that it makes a result
of, which is its cache. Where consecutive parts of a video are on consecutive ranks, the rank before
leaves them. So the ranks run the encoder side by side, each on a short part. At each convolution
every rank hands the cache that it leaves on to the next rank, and waits for that of the rank
before. ::

    rank 0   0  3  6      part 3 follows part 2, so the last rank hands on to the first,
    rank 1   1  4  7      which keeps what arrives for its next part
    rank 2   2  5  8
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.graph.contract import TensorSpec
from lltk.models.vae_frames import own_frames, shares, turns, window
from lltk.models.wan_vae import check_video
from lltk.parallel.exchange import all_parts
from lltk.parallel.groups import SEQUENCE, find_group, hand_on, receive


@torch.no_grad()
def encode_shared(
    encode: Callable[[Tensor, Turn], Tensor], config: Mapping[str, Any], video: Tensor, size: int
) -> Tensor:
    """The latents of a video, which the ranks of the group ``sequence`` encode together.

    All ranks must call it.

    Args:
        encode: gives the normalised latents of a part's frames, as `lltk.stream.encoder` does; with
            the same weights on every rank.
        config: of AutoencoderKLWan.
        video: [B, 3, F, H, W] in [-1, 1], on any device; at least one latent a rank. A rank reads
            the frames of its own `turns` only.
        size: how many ranks there are.

    Returns:
        Normalised latents of the whole video on every rank, [B, C, f, h, w].

    Raises:
        ValueError: the frames or the resolution do not make a whole number of latents, or there are
            not so many ranks, or more than latents.
        LostRank: another rank has stopped.
    """
    check_video(config, video)
    parts = turns(1 + (video.shape[2] - 1) // config["scale_factor_temporal"], size)
    longest = max(count for _, count in parts)
    rank, kept = find_group(SEQUENCE, size).rank(), dict[int, Tensor]()
    made = []
    for number in range(rank, len(parts), size):
        frames = own_frames(config, parts[number])
        turn = Turn(number, len(parts), size, kept)
        latents = encode(video[:, :, frames.start : frames.stop], turn)
        made.append(F.pad(latents, (0, 0, 0, 0, 0, longest - latents.shape[2])))
    every = all_parts(torch.stack(made, dim=2), 2, size, SEQUENCE).unflatten(2, (size, -1))
    own = [every[:, :, n % size, n // size, :count] for n, (_, count) in enumerate(parts)]
    return torch.cat(own, dim=2)


def encode_apart(
    encode: Callable[[Tensor], Tensor], config: Mapping[str, Any], video: Tensor, size: int
) -> Tensor:
    """The latents of a video of which each rank encodes a part by itself.

    A rank also encodes the frames before its part that the encoder looks back to, and waits for
    nobody before the end. All ranks must call it.

    Args:
        encode: gives the normalised latents of a video, as `lltk.models.wan_vae.encode` does.
        config: of AutoencoderKLWan.
        video: as for `encode_shared`.
        size: how many ranks there are.

    Returns:
        As `encode_shared`; errors are its, too.
    """
    check_video(config, video)
    parts = shares(1 + (video.shape[2] - 1) // config["scale_factor_temporal"], size)
    longest = max(count for _, count in parts)
    frames, dropped = window(config, parts[find_group(SEQUENCE, size).rank()])
    own = encode(video[:, :, frames.start : frames.stop])[:, :, dropped:]
    own = F.pad(own, (0, 0, 0, 0, 0, longest - own.shape[2]))
    every = all_parts(own, 2, size, SEQUENCE).split(longest, dim=2)
    return torch.cat([e[:, :, :n] for e, (_, n) in zip(every, parts, strict=True)], dim=2)


class Turn:
    """A part that a rank encodes, and the ranks that encode the parts beside it.

    Args:
        number: of the part.
        parts: how many there are.
        size: of the group ``sequence``, whose ranks take them in turn.
        kept: at the first rank, what has arrived for its next part, by cache.
    """

    def __init__(self, number: int, parts: int, size: int, kept: dict[int, Tensor]) -> None:
        self._number, self._parts, self._size = number, parts, size
        self._kept = kept

    @property
    def begins(self) -> bool:
        """Whether the video begins with this part."""
        return self._number == 0

    @property
    def _on_first_rank(self) -> bool:
        return self._number % self._size == 0

    def before(self, index: int, spec: TensorSpec, device: torch.device) -> Tensor:
        """What a convolution sees before the part's own frames.

        Args:
            index: of its cache.
            spec: the cache's; it is [B, C, F, H, W].
            device: where it is wanted.
        """
        if self._on_first_rank:
            return self._kept.pop(index)
        batch, channels, *sizes = spec.shape
        awaited = torch.empty(batch, *sizes, channels, dtype=spec.dtype, device=device)
        receive(awaited, SEQUENCE, self._size)
        return awaited.permute(_BACK)

    def after(self, index: int, cache: Tensor) -> None:
        """Hand what a convolution leaves on to the next rank.

        Args:
            index: of its cache.
            cache: [B, C, F, H, W].
        """
        cache = _laid_out(cache)
        if self._number + 1 < self._parts:
            hand_on(cache, SEQUENCE, self._size)
        if self._on_first_rank and self._number + self._size < self._parts:
            awaited = torch.empty_like(cache)
            receive(awaited, SEQUENCE, self._size)
            self._kept[index] = awaited.permute(_BACK)


_BACK = (0, 4, 1, 2, 3)


def _laid_out(cache: Tensor) -> Tensor:
    """A cache as [B, F, H, W, C], contiguous: a cache with its channels last is so already."""
    return cache.permute(0, 2, 3, 4, 1).contiguous()
