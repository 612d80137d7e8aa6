"""Wan's video VAE as diffusers ships it: its decoder as a Program, encoding, and its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lltk.graph.capture import capture
from lltk.graph.contract import Role, TensorSpec
from lltk.graph.geometry import Geometry
from lltk.graph.loading import LOADING
from lltk.graph.program import Program
from lltk.graph.recipe import ModelSection, Recipe
from lltk.graph.spec import CachedSpec, DecoderSpec
from lltk.graph.verify import verify
from lltk.graph.weights import check_weights
from lltk.models.checkpoint import Checkpoint, load_folder, save_folder
from lltk.models.configs import fill_config
from lltk.models.family import Family
from lltk.models.vae_columns import Columns, cut

_MODEL = "AutoencoderKLWan"
_CACHED_FRAMES = 2
"""Frames that a causal convolution over three frames keeps for the next call."""
_IGNORED = ("clip_output",)
"""Keys of the published ``config.json`` that the class does not take. It always clips."""

# fmt: off
_WAN22_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
    0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
    -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
    -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
    0.3573, -0.0548, -0.1681, -0.0667,
]
_WAN22_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on


def _config(mean: list[float], std: list[float], patch_size: int, **sizes: Any) -> Any:
    return MappingProxyType(
        {
            "z_dim": len(mean),
            "latents_mean": mean,
            "latents_std": std,
            "is_residual": True,
            "in_channels": 3 * patch_size**2,
            "out_channels": 3 * patch_size**2,
            "patch_size": patch_size,
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 16,
            **sizes,
        }
    )


CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "wan22_vae": _config(_WAN22_MEAN, _WAN22_STD, 2, base_dim=160, decoder_base_dim=256),
        "tiny_vae": _config(
            [0.0] * 24,
            [1.0] * 24,
            patch_size=4,
            base_dim=32,
            decoder_base_dim=32,
            dim_mult=[1, 2, 2],
            temperal_downsample=[True, True],
        ),
    }
)
"""By name. Wan2.2's statistics of latents are those of diffusers' conversion script."""


def validate_config(config: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """The configuration with diffusers' defaults, and without diffusers' notes (``_…`` keys).

    Args:
        config: arguments of AutoencoderKLWan.
        where: what errors call it.

    Raises:
        ValueError: its class, keys or types are not those of AutoencoderKLWan, or its sizes
            contradict one another.
    """
    with LOADING:
        from diffusers import AutoencoderKLWan

    known = {key: value for key, value in config.items() if key not in _IGNORED}
    full = fill_config(known, AutoencoderKLWan, where)
    patch = full["patch_size"] or 1
    agree = {
        "scale_factor_temporal": 2 ** sum(full["temperal_downsample"]),
        "scale_factor_spatial": patch * 2 ** (len(full["dim_mult"]) - 1),
        "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2,
    }
    found = {key: full[key] for key in agree}
    for key in ("latents_mean", "latents_std"):
        agree[f"len({key})"], found[f"len({key})"] = full["z_dim"], len(full[key])
    for key, wanted in agree.items():
        if found[key] != wanted:
            raise ValueError(
                f"{where}: {key} is {found[key]}, but its other sizes make it {wanted}; "
                "use the configuration of one model"
            )
    return full


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of an AutoencoderKLWan configuration's decoder."""
    blocks, resnets = len(config["dim_mult"]), config["num_res_blocks"] + 1
    around = 2 + 2 * 2  # conv_in, conv_out and the middle's two resnets of two convolutions
    upsampling = sum(config["temperal_downsample"])
    spatial = config["scale_factor_spatial"]
    return DecoderSpec(
        channels=config["z_dim"],
        patch=(1, 1, 1),
        stride=(config["scale_factor_temporal"], spatial, spatial),
        output="video",
        keep_fp32=(),
        caches=around + 2 * blocks * resnets + upsampling,
    )


def build(config: Mapping[str, Any]) -> Any:
    """The model, initialised as diffusers does."""
    with LOADING:
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan(**config)


def captured(
    config: Mapping[str, Any],
    geometry: Geometry,
    dtype: torch.dtype,
    latents: int = 1,
    columns: Columns | None = None,
) -> Program:
    """Capture the decoder at a geometry, without allocating its weights.

    Graph ``first`` decodes a video's first latent, and ``step`` one latent more. ``steps`` decodes
    several more; it is there if ``latents`` is more than 1. Latents are float32 [B, z, n, h, w],
    normalised as the transformer gives them. Video is [B, 3, 1 or n · stride, H, W] in [-1, 1], in
    the compute dtype. Feature caches are two frames long. After ``first`` the older frame is zero,
    so that the same ``step`` does for every call after it.

    Args:
        config: of AutoencoderKLWan.
        geometry: batch and resolution.
        dtype: compute dtype.
        latents: how many latents a call of ``steps`` takes.
        columns: the columns of the latents whose pixels the video has; None for all.

    Raises:
        ValueError: there are no such columns.

    Returns:
        A captured Program of kind ``decode``. It has meta weights in the configuration's dtypes
        under diffusers' names, and mean and standard deviation of the latents as constants.
    """
    model_spec = spec(config)
    program = Program("decode", model_spec, geometry, dtype, graphs={}, weights={})
    latent = (geometry.batch, model_spec.channels, 1, *geometry.latent(model_spec))
    if columns is not None and not 0 <= columns[0] < columns[1] <= latent[-1]:
        raise ValueError(
            f"model.columns: {columns[0]} to {columns[1]} are none of latents {latent[-1]} wide; "
            "name the first column and the one after the last"
        )
    part = None if columns is None else (columns, latent[-1])
    graphs: list[tuple[str, type[_Decoder], int]] = [("first", _First, 1), ("step", _Step, 1)]
    if latents > 1:
        graphs.append(("steps", _Step, latents))
    for name, module, count in graphs:
        sizes = (*latent[:2], count, *latent[3:])
        given = {"latents": TensorSpec(sizes, torch.float32, Role.LATENTS)}
        capture_call(program, name, partial(module, config, dtype, part), given)
    program.constants = statistics(config)
    verify(program)
    return program


def capture_call(
    program: Program, name: str, make: Callable[[], nn.Module], given: Mapping[str, TensorSpec]
) -> None:
    """Capture a graph of an autoencoder's half, which reads the caches of the graph before it.

    Args:
        program: gets the graph and its weights, which run in its dtype.
        name: of the graph.
        make: makes the module, which takes what is given and, but for the first graph, all caches.
        given: what else the graph reads.
    """
    model, inputs = program.model, dict(given)
    assert isinstance(model, CachedSpec)
    for before in list(program.graphs)[-1:]:
        made = program.contract(before).outputs
        for read, left in zip(model.cache_inputs, model.cache_outputs, strict=True):
            inputs[read] = replace(made[left], role=Role.CACHE)
    program.graphs[name], program.weights, _ = capture(
        make, inputs, (model.output, *model.cache_outputs), lambda _name, _parameter: program.dtype
    )


def statistics(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Mean and standard deviation of the latents, float32 [1, z, 1, 1, 1] each."""
    names = ("latents_mean", "latents_std")
    return {name: torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in names}


class _Decoder(nn.Module):
    """What all graphs share. Parameters have diffusers' names."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(
        self, config: Mapping[str, Any], dtype: torch.dtype, part: tuple[Columns, int] | None
    ) -> None:
        super().__init__()
        vae = build(config)
        if part is not None:
            cut(vae.decoder, config, *part)
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.dtype = dtype
        self.caches = spec(config).caches
        self.patch_size = config["patch_size"]
        for name, value in statistics(config).items():
            self.register_buffer(name, value, persistent=False)

    def decode(self, latents: Tensor, caches: list[Any], first: bool) -> Tensor:
        """The video of some latents. diffusers replaces ``caches`` by the new ones in place."""
        with LOADING:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        scaled = (latents * self.latents_std + self.latents_mean).to(self.dtype)
        video = self.decoder(
            self.post_quant_conv(scaled), feat_cache=caches, feat_idx=[0], first_chunk=first
        )
        if self.patch_size is not None:
            video = unpatchify(video, self.patch_size)
        return video.clamp(-1, 1)


class _First(_Decoder):
    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        caches: list[Any] = [None] * self.caches
        video = self.decode(latents, caches, first=True)
        padded: list[Tensor] = []
        for cache in caches:
            if isinstance(cache, Tensor):
                missing = _CACHED_FRAMES - cache.shape[2]
                padded.append(F.pad(cache, (0, 0, 0, 0, missing, 0)))
            else:
                # This convolution starts with the second latent, over two zero frames. It has as
                # many channels as the convolution before it. The dtype is stated, so that it stays
                # if a pass changes that of the cache before.
                assert cache == "Rep"
                padded.append(torch.zeros_like(padded[-1], dtype=padded[-1].dtype))
        return video, *padded


class _Step(_Decoder):
    def forward(self, latents: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        caches = list(given.values())
        video = self.decode(latents, caches, first=False)
        return video, *(cache.contiguous() for cache in caches)


def decoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a VAE that its decode Program has."""
    return {
        name: weight
        for name, weight in weights.items()
        if name.startswith(("decoder.", "post_quant_conv."))
    }


def load_vae(path: str | Path) -> Checkpoint:
    """Read a VAE in diffusers' layout, from its folder or from a pipeline's folder.

    Raises:
        ValueError: there is no such folder, a file is damaged, or the weights are not those of the
            configuration or not finite.
    """
    stated, weights = load_folder(path, "vae")
    config = validate_config(stated, str(path))
    check_weights(weights, _shapes(config), str(path))
    return Checkpoint(weights, config, "diffusers")


def save_vae(
    path: str | Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Write a VAE's folder in diffusers' layout, whole or not at all.

    Args:
        path: as for `save_folder`.
        weights: of encoder and decoder, under diffusers' names; dtypes and values are kept.
        config: of AutoencoderKLWan.
        overwrite: whether a folder that holds anything else may be replaced.

    Raises:
        ValueError: the weights are not those of the configuration or not finite, or the folder
            holds other files.
    """
    full = validate_config(config, str(path))
    check_weights(weights, _shapes(full), str(path))
    save_folder(path, weights, full, _MODEL, overwrite=overwrite)


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build(config).state_dict().items()}


def make_vae(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """The whole VAE as diffusers' module. It uses the given weights, not copies of them."""
    with torch.device("meta"):
        vae = build(config)
    vae.load_state_dict(dict(weights), assign=True)
    return vae.eval()


@torch.no_grad()
def encode(vae: Any, video: Tensor) -> Tensor:
    """The latents of a video, normalised as the transformer takes them; the posterior's mean.

    Args:
        vae: from `make_vae`, on the video's device.
        video: [B, 3, 1 + k·stride, H, W] in [-1, 1].

    Returns:
        [B, z, 1 + k, h, w], float32, or float64 where the VAE computes in it.

    Raises:
        ValueError: the frames or the resolution do not make a whole number of latents.
    """
    check_video(vae.config, video)
    return normalised(vae.config, vae.encode(video.to(vae.dtype)).latent_dist.mode())


def check_video(config: Mapping[str, Any], video: Tensor) -> None:
    """Refuse a video that makes no whole number of latents.

    Raises:
        ValueError: its frames or its resolution do not.
    """
    frames, *sides = video.shape[2:]
    time, space = config["scale_factor_temporal"], config["scale_factor_spatial"]
    if (frames - 1) % time or any(side % space for side in sides):
        raise ValueError(
            f"video: {tuple(video.shape)} is no whole number of latents; give 1 + k·{time} frames "
            f"and sides that are multiples of {space} pixels"
        )


def normalised(config: Mapping[str, Any], latents: Tensor) -> Tensor:
    """The encoder's latents [B, z, F, h, w] as the transformer takes them, in float32 or wider."""
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    mean, deviation = (part.to(latents.device) for part in statistics(config).values())
    return (latents - mean) / deviation


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """The video of whole clips' latents, by diffusers' own decoder.

    Args:
        vae: from `make_vae`, on the latents' device.
        latents: float32 [B, z, 1 + k, h, w], normalised.

    Returns:
        float32 [B, 3, 1 + k·stride, H, W] in [-1, 1].
    """
    mean, deviation = (part.to(latents.device) for part in statistics(vae.config).values())
    video: Tensor = vae.decode((latents * deviation + mean).to(vae.dtype)).sample
    return video.float()


def encode_image(vae: Any, image: Tensor) -> Tensor:
    """The latent of an image as a video's first frame.

    Args:
        vae: from `make_vae`, on the image's device.
        image: [B, 3, H, W] in [-1, 1].

    Returns:
        [B, z, 1, h, w], normalised, as `encode` gives them.
    """
    return encode(vae, image.unsqueeze(2))


def _load(section: ModelSection) -> Checkpoint:
    whole = load_vae(str(section.checkpoint))
    return replace(whole, weights=decoder_weights(whole.weights))


def _capture(config: Mapping[str, Any], recipe: Recipe) -> Program:
    model, dtype = recipe.model, getattr(torch, recipe.model.dtype)
    return captured(config, recipe.geometry, dtype, model.latents, model.columns)


FAMILY = Family(
    name="decoder",
    kinds=("decode",),
    options=frozenset({"latents", "columns"}),
    configs=CONFIGS,
    validate=validate_config,
    load=_load,
    build=build,
    capture=_capture,
)
