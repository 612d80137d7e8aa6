"""Training an autoencoder: reconstruction of short clips, with a small KL term."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lltk.graph.diagnose import first_bad_module
from lltk.graph.loading import LOADING
from lltk.train.data import Batch
from lltk.train.graphs import Graphed
from lltk.train.recipe import VaeSection

SCALES = (1, 2, 4)
"""Differences are averaged over squares of this many pixels a side."""


class Reconstruction:
    """How well an AutoencoderKLWan reconstructs whole clips.

    With d the reconstruction less the clip, a clip's loss is the sum of

    - 4·d²;
    - the mean over `SCALES` of |d| + edges·(|∂d/∂y| + |∂d/∂x|), see `roughness`;
    - kl·KL(posterior ‖ N(0, 1)).

    Each term is a mean over pixels or latents. The decoder's output is not clipped to ±1 before, so
    that every pixel has a gradient.

    A batch holds ``video``, [B, 3, F, H, W] in [-1, 1], of 1 + 4·k frames.

    Args:
        vae: diffusers' AutoencoderKLWan.
        section: has the clips of a call and the weights ``edges`` and ``kl``.
        start: the values that training starts from, by parameter name; by default the VAE's own.
        graphs: whether to replay CUDA graphs.
    """

    memory = None
    critic = None
    work = None

    def __init__(
        self,
        vae: Any,
        section: VaeSection,
        start: Mapping[str, Tensor] | None = None,
        graphs: bool = False,
    ) -> None:
        self._vae = vae
        self._section = section
        self._start = start
        self._losses: nn.Module = _Losses(vae, section)
        self._loss = Graphed(self._losses) if graphs else self._losses

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._vae
        return module

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return self._start or dict(self.module.named_parameters())

    @property
    def clips(self) -> int:
        return self._section.batch

    def count(self, batch: Batch) -> int:
        return len(batch.indices)

    def loss(self, batch: Batch) -> Tensor:
        return self._sum(self._loss, batch)

    def weights_changed(self) -> None:
        """Nothing has to be renewed: nothing here follows from the weights alone."""

    def first_bad(self, batch: Batch) -> str | None:
        if not bool(batch.tensors["video"].isfinite().all()):
            return "input video"
        return first_bad_module(self.module, lambda: self._sum(self._losses, batch))

    def _sum(self, losses: nn.Module, batch: Batch) -> Tensor:
        parameter = next(self.module.parameters())
        video = batch.tensors["video"].to(parameter.device, parameter.dtype)
        frames, height, width = video.shape[2:]
        config = self._vae.config
        space = config.scale_factor_spatial
        latent = (1 + frames // config.scale_factor_temporal, height // space, width // space)
        noise = batch.normal("posterior", config.z_dim, *latent, device=parameter.device)
        result: Tensor = losses(video, noise).sum()
        return result


class _Losses(nn.Module):
    """Each clip's loss, [B], from the video and the posterior's noise, float32 [B, z, F, h, w]."""

    def __init__(self, vae: nn.Module, section: VaeSection) -> None:
        super().__init__()
        self.vae = vae
        self.section = section

    def forward(self, video: Tensor, noise: Tensor) -> Tensor:
        posterior = cast(Any, self.vae).encode(video).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + noise * (logvar / 2).exp()
        difference = decode(self.vae, latents.to(video.dtype)).float() - video.float()
        divergence = (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1) / 2
        squares = 4 * difference.square().flatten(1).mean(1)
        return squares + roughness(difference, self.section.edges) + self.section.kl * divergence


def roughness(difference: Tensor, edges: float) -> Tensor:
    """|d| + edges·(|∂d/∂y| + |∂d/∂x|), averaged over `SCALES`.

    Args:
        difference: d, [B, C, F, H, W]; H and W are multiples of the scales.
        edges: weight of the derivatives, which are differences between neighbouring pixels.

    Returns:
        [B].
    """
    total = difference.new_zeros(len(difference))
    for scale in SCALES:
        pooled = F.avg_pool3d(difference, (1, scale, scale))
        down, across = pooled.diff(dim=-2), pooled.diff(dim=-1)
        slopes = down.abs().flatten(1).mean(1) + across.abs().flatten(1).mean(1)
        total = total + pooled.abs().flatten(1).mean(1) + edges * slopes
    return total / len(SCALES)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode as ``vae.decode`` does, but without clipping to ±1.

    Args:
        vae: diffusers' AutoencoderKLWan.
        latents: [B, z, F, h, w], not normalised, as the encoder gives them.

    Returns:
        [B, 3, 4·F − 3, H, W].
    """
    with LOADING:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

    convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    cache: list[Tensor | None] = [None] * convolutions
    parts = []
    for index, frame in enumerate(vae.post_quant_conv(latents).split(1, dim=2)):
        first = {"first_chunk": True} if index == 0 else {}
        parts.append(vae.decoder(frame, feat_cache=cache, feat_idx=[0], **first))
    video: Tensor = torch.cat(parts, dim=2)
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video


@torch.no_grad()
def latent_statistics(vae: Any, videos: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over clips.

    A VAE's configuration has them, so that a transformer can be given normalised latents.

    Args:
        vae: diffusers' AutoencoderKLWan.
        videos: each [B, 3, F, H, W] in [-1, 1].

    Returns:
        ``latents_mean`` and ``latents_std``, each with a number for each channel.
    """
    parameter = next(vae.parameters())
    encoded = [
        vae.encode(video.to(parameter.device, parameter.dtype)).latent_dist.mean.double()
        for video in videos
    ]
    channels = torch.cat([latents.transpose(0, 1).flatten(1) for latents in encoded], dim=1)
    return channels.mean(1).tolist(), channels.std(1).tolist()
