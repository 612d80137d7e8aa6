"""The encoder of Wan's video VAE as a Program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lltk.graph.contract import Role, TensorSpec
from lltk.graph.geometry import Geometry
from lltk.graph.loading import LOADING
from lltk.graph.program import Program
from lltk.graph.recipe import ModelSection, Recipe
from lltk.graph.spec import EncoderSpec
from lltk.graph.verify import verify
from lltk.models.checkpoint import Checkpoint
from lltk.models.family import Family
from lltk.models.wan_vae import CONFIGS, build, capture_call, load_vae, statistics, validate_config


def spec(config: Mapping[str, Any]) -> EncoderSpec:
    """The spec of an AutoencoderKLWan configuration's encoder."""
    blocks, resnets = len(config["dim_mult"]), config["num_res_blocks"]
    around = 2 + 2 * 2  # conv_in, conv_out and the middle's two resnets of two convolutions
    spatial = config["scale_factor_spatial"]
    return EncoderSpec(
        channels=config["z_dim"],
        patch=(1, 1, 1),
        stride=(config["scale_factor_temporal"], spatial, spatial),
        output="latents",
        keep_fp32=(),
        caches=around + 2 * blocks * resnets + sum(config["temperal_downsample"]),
    )


def captured(
    config: Mapping[str, Any], geometry: Geometry, dtype: torch.dtype, latents: int = 1
) -> Program:
    """Capture the encoder at a geometry, without allocating its weights.

    Graph ``first`` encodes a video's first frame, and ``step`` the frames of one latent more.
    ``steps`` encodes those of several more; it is there if ``latents`` is more than 1. Video is
    float32 [B, 3, 1 or n · stride, H, W] in [-1, 1]. Latents are float32 [B, z, n, h, w], or
    float64 where that is the dtype: the posterior's mean, normalised as the transformer takes it. A
    feature cache is as many frames as its convolution looks back to, two, or one where it halves
    the frames. After ``first`` the older one of two is zero, so that the same ``step`` does for
    every call after it.

    Args:
        config: of AutoencoderKLWan.
        geometry: batch and resolution.
        dtype: compute dtype.
        latents: how many latents a call of ``steps`` makes.

    Returns:
        A captured Program of kind ``encode``. It has meta weights in the configuration's dtypes
        under diffusers' names, and mean and standard deviation of the latents as constants.
    """
    model = spec(config)
    program = Program("encode", model, geometry, dtype, graphs={}, weights={})
    geometry.latent(model)  # refuses what is no whole number of latents
    graphs: list[tuple[str, type[_Encoder], int]] = [
        ("first", _First, 1),
        ("step", _Step, model.stride[0]),
    ]
    if latents > 1:
        graphs.append(("steps", _Step, latents * model.stride[0]))
    for name, module, frames in graphs:
        sizes = (geometry.batch, 3, frames, geometry.height, geometry.width)
        given = {"video": TensorSpec(sizes, torch.float32, Role.VIDEO)}
        capture_call(program, name, partial(module, config, dtype), given)
    program.constants = statistics(config)
    verify(program)
    return program


class _Encoder(nn.Module):
    """What all graphs share. Parameters have diffusers' names."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        vae = build(config)
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv
        self.dtype = dtype
        self.patch_size = config["patch_size"]
        for name, value in statistics(config).items():
            self.register_buffer(name, value, persistent=False)

    def encode(self, video: Tensor, caches: list[Any]) -> Tensor:
        """The latents of some frames. diffusers replaces ``caches`` by the new ones in place."""
        with LOADING:
            from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        frames = video.to(self.dtype)
        if self.patch_size is not None:
            frames = patchify(frames, self.patch_size)
        made = self.encoder(frames, feat_cache=caches, feat_idx=[0])
        mean, _ = self.quant_conv(made).chunk(2, dim=1)
        mean = mean.to(torch.promote_types(self.dtype, torch.float32))
        return (mean - self.latents_mean) / self.latents_std


class _First(_Encoder):
    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        lookbacks = cached_frames(self.encoder)
        caches: list[Any] = [None] * len(lookbacks)
        latents = self.encode(video, caches)
        padded = [
            F.pad(cache, (0, 0, 0, 0, frames - cache.shape[2], 0))
            for cache, frames in zip(caches, lookbacks, strict=True)
        ]
        return latents, *padded


class _Step(_Encoder):
    def forward(self, video: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        caches = list(given.values())
        latents = self.encode(video, caches)
        return latents, *(cache.contiguous() for cache in caches)


def cached_frames(encoder: Any) -> list[int]:
    """How many frames each convolution over several frames looks back to, in the caches' order."""
    with LOADING:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [
        module.kernel_size[0] - module.stride[0]
        for module in encoder.modules()
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1
    ]


def encoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a VAE that its encode Program has."""
    return {
        name: weight
        for name, weight in weights.items()
        if name.startswith(("encoder.", "quant_conv."))
    }


def _load(section: ModelSection) -> Checkpoint:
    whole = load_vae(str(section.checkpoint))
    return replace(whole, weights=encoder_weights(whole.weights))


def _capture(config: Mapping[str, Any], recipe: Recipe) -> Program:
    model = recipe.model
    return captured(config, recipe.geometry, getattr(torch, model.dtype), model.latents)


FAMILY = Family(
    name="encoder",
    kinds=("encode",),
    options=frozenset({"latents"}),
    configs=CONFIGS,
    validate=validate_config,
    load=_load,
    build=build,
    capture=_capture,
)
