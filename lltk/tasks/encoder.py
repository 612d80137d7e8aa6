"""Videos and captions as latents and embeddings, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lltk.compiler import with_weights
from lltk.graph.geometry import Geometry
from lltk.graph.module import instantiate
from lltk.graph.passes import Pass, run_passes
from lltk.models import vae_encoder
from lltk.models.pipelines import find_pipeline
from lltk.models.vae_frames import LONGEST, Way
from lltk.models.vae_ranks import encode_apart, encode_shared
from lltk.models.wan_vae import check_video, decode, load_vae, make_vae
from lltk.ops.implementations import find_implementation
from lltk.passes import make_pass
from lltk.stream.encoder import Encoder
from lltk.stream.text import TextEncoder
from lltk.train.recipe import DataSection

_CALLS = 16
"""Of how many calls the prompts' embeddings are kept."""


class PipelineEncoder:
    """The autoencoder and the text encoder of a pipeline.

    Args:
        pipeline: folder with ``vae``, ``text_encoder`` and ``tokenizer``.
        text_tokens: tokens that a prompt is padded to.
        device: where both run and leave their results.
        dtype: the dtype that both compute in.
        way: how ranks that share a clip encode it; see ``train.data.encoding``.

    Raises:
        ValueError: a part is missing from the folder, or cannot be read.
    """

    def __init__(
        self,
        pipeline: Path,
        text_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        way: Way = "shared",
    ) -> None:
        self._way = way
        self._text = TextEncoder(pipeline, text_tokens, dtype, device)
        self._embeddings = lru_cache(_CALLS)(self._encoded)
        vae = load_vae(pipeline)
        self._config, self._weights = vae.config or {}, vae.weights
        self._encoders: dict[tuple[int, int, int], Encoder] = {}
        self._device = device
        self._dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where the autoencoder computes, and leaves latents."""
        return self._device

    @property
    def stride(self) -> int:
        """Video frames in a latent frame."""
        stride: int = self._config["scale_factor_temporal"]
        return stride

    @cached_property
    def _vae(self) -> Any:
        """The autoencoder as diffusers' module."""
        cast = {name: w.to(self._device, self._dtype) for name, w in self._weights.items()}
        return make_vae(self._config, cast)

    def _encoder(self, batch: int, height: int, width: int) -> Encoder:
        """The autoencoder's encoder for clips of a size; it is captured once."""
        size = batch, height, width
        if size not in self._encoders:
            sizes = {"batch": batch, "height": height, "width": width}
            geometry = Geometry.model_validate(sizes)
            captured = vae_encoder.captured(self._config, geometry, self._dtype, LONGEST)
            program = run_passes(captured, encoder_passes(self._device, self._dtype))
            program = with_weights(program, vae_encoder.encoder_weights(self._weights))
            self._encoders[size] = Encoder(program, instantiate(program, self._device))
        return self._encoders[size]

    def latents(self, video: Tensor, ranks: int = 1) -> Tensor:
        """The latents of a video.

        Args:
            video: [B, 3, 1 + k·stride, H, W], as `Encoder.encode` takes it.
            ranks: how many ranks of the group ``sequence`` encode it together, which all call this.

        Returns:
            Normalised latents, float32 [B, C, 1 + k, h, w].

        Raises:
            ValueError: the frames or the resolution do not make a whole number of latents.
        """
        if ranks == 1 or self._way == "whole":
            return self._encode(video)
        if self._way == "lookback":
            return encode_apart(self._encode, self._config, video, ranks)
        encoder = self._encoder(len(video), *video.shape[3:])
        return encode_shared(encoder.encode_part, self._config, video, ranks)

    def _encode(self, video: Tensor) -> Tensor:
        check_video(self._config, video)
        return self._encoder(len(video), *video.shape[3:]).encode(video)

    @torch.no_grad()
    def video(self, latents: Tensor) -> Tensor:
        """The video of latents: the inverse of `latents`, with the same shapes, in float32."""
        return decode(self._vae, latents.to(self._device))

    def text(self, prompts: Sequence[str]) -> Tensor:
        """The prompts' embeddings, float32 [n, S, E] in main memory.

        Their bits depend on these prompts alone, and not on what was encoded before.
        """
        distinct = tuple(dict.fromkeys(prompts))
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        return self._embeddings(distinct)[[rows[prompt] for prompt in prompts]]

    def _encoded(self, prompts: tuple[str, ...]) -> Tensor:
        return self._text.encode(prompts).cpu().float()


def encoder_passes(device: torch.device, dtype: torch.dtype) -> list[Pass[Any]]:
    """The passes that make encoding fast on a device.

    Triton's kernels on a GPU that can run them, and oneDNN for float32 on a CPU that has it.
    """
    names = ["canonicalise"]
    if device.type == "cuda":
        triton = find_implementation("cached_norm_silu", "triton").missing(device) is None
        names += ["fuse_norm_silu", "channels_last", "lower"] if triton else ["channels_last"]
    elif dtype == torch.float32 and torch.backends.mkldnn.is_available():
        names += ["channels_last", "onednn_conv3d"]
    return [make_pass(name, {"prefer": ["triton"]} if name == "lower" else {}) for name in names]


def encoder_for(
    data: DataSection, geometry: Geometry, device: torch.device, dtype: torch.dtype
) -> PipelineEncoder:
    """The encoder of ``train.data.pipeline``, for a Program of this geometry and dtype.

    Raises:
        ValueError: as `pipeline_of`, or it lacks a part.
    """
    folder = pipeline_of(data)
    return PipelineEncoder(folder, geometry.text_tokens, device, dtype, data.encoding)


def pipeline_of(data: DataSection) -> Path:
    """The folder of ``train.data.pipeline``.

    Raises:
        ValueError: no pipeline is named, or there is none of that name.
    """
    if data.pipeline is None:
        raise ValueError(
            "train.data.pipeline: names no folder; set it to one with vae, text_encoder and "
            "tokenizer"
        )
    return find_pipeline(data.pipeline)
