"""Encoding a video on several ranks at once: together, no frame of it twice, or each by itself.

Together (`encode_shared`): a causal convolution sees two frames before those that it makes a result
of. Where consecutive parts of a video are on consecutive ranks, these are the last frames of the
rank before. So the ranks run the encoder side by side, each on a short part. At each convolution
every rank hands the last frames of its input on to the next rank, and waits for those of the rank
before. ::

    rank 0   0  3  6      part 3 follows part 2, so the last rank hands on to the first,
    rank 1   1  4  7      which keeps what arrives for its next part
    rank 2   2  5  8

The video's first frame is encoded by itself before the rest of its part, as diffusers does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lltk.graph.loading import LOADING
from lltk.models.vae_frames import own_frames, shares, turns, window
from lltk.models.wan_vae import check_video, normalised
from lltk.parallel.exchange import all_parts
from lltk.parallel.groups import SEQUENCE, find_group, hand_on

_SEEN = 2
"""Frames that a convolution sees before its own."""


@torch.no_grad()
def encode_shared(vae: Any, video: Tensor, size: int) -> Tensor:
    """The latents of a video, which the ranks of the group ``sequence`` encode together.

    All ranks must call it.

    Args:
        vae: as for `encode`; it has the same weights on every rank.
        video: as for `encode`, but on any device; at least one latent a rank. A rank reads the
            frames of its own `turns` only.
        size: how many ranks there are.

    Returns:
        Normalised latents of the whole video on every rank, as `encode` gives them.

    Raises:
        ValueError: as `encode`, or there are not so many ranks, or more than latents.
        LostRank: another rank has stopped.
    """
    check_video(vae.config, video)
    parts = turns(1 + (video.shape[2] - 1) // vae.config.scale_factor_temporal, size)
    longest = max(count for _, count in parts)
    rank, kept = find_group(SEQUENCE, size).rank(), dict[int, Tensor]()
    made = []
    for number in range(rank, len(parts), size):
        frames = own_frames(vae.config, parts[number])
        place = _Place(number, len(parts), size, kept)
        latents = _encode_part(vae, video[:, :, frames.start : frames.stop], place)
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


class _Place:
    """A part's place among all parts of a video.

    Args:
        number: of the part.
        parts: how many there are.
        size: of the group ``sequence``, whose ranks take them in turn.
        kept: at the first rank, what has arrived for its next part, by convolution.
    """

    def __init__(self, number: int, parts: int, size: int, kept: dict[int, Tensor]) -> None:
        self.begins = number == 0
        """Whether the video begins with this part."""
        self._on_first_rank = number % size == 0
        self._sends = number + 1 < parts
        self._awaits = not self._on_first_rank or number + size < parts
        self._size = size
        self._kept = kept

    def before(self, index: int, x: Tensor, known: Tensor | None, count: int) -> Tensor | None:
        """The frames before a convolution's own. The next rank gets those before its own.

        Args:
            index: of the convolution.
            x: own frames, [B, C, F, H, W].
            known: in the first part those before them; None where the video begins.
            count: how many frames the convolution sees before its own.

        Returns:
            [B, C, count, H, W]; in the first part what is known.
        """
        awaited = x.new_empty(*x.shape[:2], count, *x.shape[3:]) if self._awaits else None
        if self._on_first_rank:
            known = known if self.begins else self._kept.pop(index)
            if awaited is not None:
                self._kept[index] = awaited
        else:
            known = awaited
            if x.shape[2] < count:  # what arrives is handed on
                hand_on(None, awaited, SEQUENCE, self._size)
                awaited = None
        sent = None
        if self._sends:
            sent = x[:, :, -count:]
            sent = sent if known is None else torch.cat([known, sent], dim=2)
            sent = F.pad(sent, (0, 0, 0, 0, max(0, count - sent.shape[2]), 0))
            sent = sent[:, :, -count:].contiguous()
        hand_on(sent, awaited, SEQUENCE, self._size)
        return known


def _encode_part(vae: Any, video: Tensor, place: _Place) -> Tensor:
    """The normalised latents of a part's frames."""
    with LOADING:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    x = video.to(vae.device, vae.dtype)
    if vae.config.patch_size is not None:
        x = patchify(x, vae.config.patch_size)
    begin = 1 if place.begins and x.shape[2] > 1 else 0
    caches: list[Any] = [None] * len(_convolutions(vae.encoder))
    made = [vae.encoder(x[:, :, :1], feat_cache=caches, feat_idx=[0])] if begin else []
    with _handing_on(vae.encoder, place, len(x), caches):
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
def _handing_on(encoder: Any, place: _Place, clips: int, caches: list[Any]) -> Iterator[None]:
    """Let convolutions see the frames of the rank before, within the block."""
    with LOADING:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

    handles = []
    for index, name in enumerate(_convolutions(encoder)):
        owner = encoder.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, WanResample):
            halving = _BeforeHalving(place, index, clips, caches)
            handles.append(owner.resample.register_forward_hook(halving))
        else:
            before = _BeforeConvolution(place, index)
            handles.append(encoder.get_submodule(name).register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BeforeConvolution:
    """A hook that gives a convolution the frames before its own."""

    def __init__(self, place: _Place, index: int) -> None:
        self._place = place
        self._index = index

    def __call__(self, module: nn.Module, inputs: Any) -> Any:
        x, known = inputs
        return x, self._place.before(self._index, x, known, _SEEN)


class _BeforeHalving:
    """A hook on what comes before a convolution that halves the frames, and reads its own cache.

    It sees one frame before its own.
    """

    def __init__(self, place: _Place, index: int, clips: int, caches: list[Any]) -> None:
        self._place = place
        self._index = index
        self._clips = clips
        self._caches = caches

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        x = output.unflatten(0, (self._clips, -1)).transpose(1, 2)
        known = self._caches[self._index]
        self._caches[self._index] = self._place.before(self._index, x, known, 1)
