"""Videos and captions as latents and embeddings, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lltk.graph.geometry import Geometry
from lltk.models.pipelines import find_pipeline
from lltk.models.vae_ranks import encode_shared
from lltk.models.wan_vae import decode, encode, load_vae, make_vae
from lltk.stream.text import TextEncoder
from lltk.train.recipe import DataSection


class PipelineEncoder:
    """The autoencoder and the text encoder of a pipeline.

    Args:
        pipeline: folder with ``vae``, ``text_encoder`` and ``tokenizer``.
        text_tokens: tokens that a prompt is padded to.
        device: where both run and leave their results.
        dtype: the dtype that both compute in.

    Raises:
        ValueError: a part is missing from the folder, or cannot be read.
    """

    def __init__(
        self, pipeline: Path, text_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._text = TextEncoder(pipeline, text_tokens, dtype, device)
        self._embeddings: dict[str, Tensor] = {}
        vae = load_vae(pipeline)
        weights = {name: weight.to(device, dtype) for name, weight in vae.weights.items()}
        self._vae = make_vae(vae.config or {}, weights)
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where the autoencoder computes, and leaves latents."""
        return self._device

    @property
    def stride(self) -> int:
        """Video frames in a latent frame."""
        stride: int = self._vae.config.scale_factor_temporal
        return stride

    def latents(self, video: Tensor, ranks: int = 1) -> Tensor:
        """The latents of a video.

        Args:
            video: [B, 3, 1 + k·stride, H, W] in [-1, 1].
            ranks: how many ranks of the group ``sequence`` encode it together, which all call this.

        Returns:
            Normalised latents, float32 [B, C, 1 + k, h, w].
        """
        if ranks > 1:
            return encode_shared(self._vae, video, ranks)
        return encode(self._vae, video.to(self._device))

    @torch.no_grad()
    def video(self, latents: Tensor) -> Tensor:
        """The video of latents: the inverse of `latents`, with the same shapes, in float32."""
        return decode(self._vae, latents.to(self._device))

    def text(self, prompts: Sequence[str]) -> Tensor:
        """The prompts' embeddings, float32 [n, S, E] in main memory; each is made only once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if new:
            self._embeddings |= zip(new, self._text.encode(new).cpu().float(), strict=True)
        return torch.stack([self._embeddings[prompt] for prompt in prompts])


def encoder_for(
    data: DataSection, geometry: Geometry, device: torch.device, dtype: torch.dtype
) -> PipelineEncoder:
    """The encoder of ``train.data.pipeline``, for a Program of this geometry and dtype.

    Raises:
        ValueError: no pipeline is named, there is none of that name, or it lacks a part.
    """
    if data.pipeline is None:
        raise ValueError(
            "train.data.pipeline: names no folder; set it to one with vae, text_encoder and "
            "tokenizer"
        )
    return PipelineEncoder(find_pipeline(data.pipeline), geometry.text_tokens, device, dtype)
