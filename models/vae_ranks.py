"""Encoding a video on several ranks at once, each its own frames and no others.

A causal convolution sees two frames before those that it makes a result of. Where ranks hold
consecutive parts of a video, these are the last frames of the rank before. So the ranks run the
encoder side by side. At each convolution every rank hands the last frames of its input on to the
next rank, and waits for those of the rank before. The first rank encodes the video's first frame
by itself before all that, as diffusers does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lltk.graph.loading import LOADING
from lltk.models.vae_frames import own_frames, shares
from lltk.models.wan_vae import check_video, normalised
from lltk.parallel.exchange import all_parts
from lltk.parallel.groups import SEQUENCE, find_group, hand_on

_SEEN = 2
"""Frames that a convolution sees before its own."""


@torch.no_grad()
def encode_shared(vae: Any, video: Tensor, size: int) -> Tensor:
    """The latents of a video, of which each rank of the group ``sequence`` encodes its share.

    All ranks must call it.

    Args:
        vae: as for `encode`; it has the same weights on every rank.
        video: as for `encode`, but on any device; at least one latent a rank. A rank reads its own
            frames only.
        size: how many ranks there are.

    Returns:
        Normalised latents of the whole video on every rank, as `encode` gives them.

    Raises:
        ValueError: as `encode`, or there are not so many ranks.
        LostRank: another rank has stopped.
    """
    check_video(vae.config, video)
    parts = shares(1 + (video.shape[2] - 1) // vae.config.scale_factor_temporal, size)
    rank = find_group(SEQUENCE, size).rank()
    frames = own_frames(vae.config, parts[rank])
    own = _encode_own(vae, video[:, :, frames.start : frames.stop], _Row(rank, size))
    longest = max(count for _, count in parts)
    padded = F.pad(own, (0, 0, 0, 0, 0, longest - own.shape[2]))
    every = all_parts(padded, 2, size, SEQUENCE).split(longest, dim=2)
    return torch.cat([x[:, :, :count] for x, (_, count) in zip(every, parts, strict=True)], dim=2)


class _Row:
    """The ranks that hold consecutive frames of a video, and this one's place among them."""

    def __init__(self, rank: int, size: int) -> None:
        self.first = rank == 0
        self._last = rank == size - 1
        self._size = size

    def before(self, x: Tensor, known: Tensor | None, count: int) -> Tensor | None:
        """The ``count`` frames before a rank's own. The next rank gets those before its own.

        Args:
            x: own frames, [B, C, F, H, W].
            known: what the first rank has before them; None where the video begins.
            count: how many.

        Returns:
            [B, C, count, H, W], or ``known`` at the first rank.
        """
        awaited = None if self.first else x.new_empty(*x.shape[:2], count, *x.shape[3:])
        if awaited is not None:
            known = awaited
            if x.shape[2] < count:  # what arrives is handed on
                hand_on(None, awaited, SEQUENCE, self._size)
                awaited = None
        sent = None
        if not self._last:
            sent = x[:, :, -count:]
            sent = sent if known is None else torch.cat([known, sent], dim=2)
            sent = F.pad(sent, (0, 0, 0, 0, max(0, count - sent.shape[2]), 0))
            sent = sent[:, :, -count:].contiguous()
        hand_on(sent, awaited, SEQUENCE, self._size)
        return known


def _encode_own(vae: Any, video: Tensor, row: _Row) -> Tensor:
    """The normalised latents of a rank's frames."""
    with LOADING:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    x = video.to(vae.device, vae.dtype)
    if vae.config.patch_size is not None:
        x = patchify(x, vae.config.patch_size)
    begin = 1 if row.first and x.shape[2] > 1 else 0
    caches: list[Any] = [None] * len(_convolutions(vae.encoder))
    made = [vae.encoder(x[:, :, :1], feat_cache=caches, feat_idx=[0])] if begin else []
    with _handing_on(vae.encoder, row, len(x), caches):
        made.append(vae.encoder(x[:, :, begin:], feat_cache=caches, feat_idx=[0]))
    latents, _ = vae.quant_conv(torch.cat(made, dim=2)).chunk(2, dim=1)  # means, log-variances
    return normalised(vae.config, latents)


def _convolutions(encoder: Any) -> list[str]:
    """The names of the convolutions over several frames, in the order of their caches."""
    with LOADING:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1
    ]


@contextmanager
def _handing_on(encoder: Any, row: _Row, clips: int, caches: list[Any]) -> Iterator[None]:
    """Let convolutions see the frames of the rank before, within the block."""
    with LOADING:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

    handles = []
    for index, name in enumerate(_convolutions(encoder)):
        owner = encoder.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, WanResample):
            hook = _BeforeHalving(row, clips, caches, index)
            handles.append(owner.resample.register_forward_hook(hook))
        else:
            convolution = encoder.get_submodule(name)
            handles.append(convolution.register_forward_pre_hook(_BeforeConvolution(row)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BeforeConvolution:
    """A hook that gives a convolution the frames before its own."""

    def __init__(self, row: _Row) -> None:
        self._row = row

    def __call__(self, module: nn.Module, inputs: Any) -> Any:
        x, known = inputs
        return x, self._row.before(x, known, _SEEN)


class _BeforeHalving:
    """A hook on what comes before a convolution that halves the frames, and reads its own cache.

    It sees one frame before its own.
    """

    def __init__(self, row: _Row, clips: int, caches: list[Any], index: int) -> None:
        self._row = row
        self._clips = clips
        self._caches = caches
        self._index = index

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        x = output.unflatten(0, (self._clips, -1)).transpose(1, 2)
        self._caches[self._index] = self._row.before(x, self._caches[self._index], 1)
