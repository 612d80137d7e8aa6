"""Videos and captions as what a transformer trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lltk.graph.geometry import Geometry
from lltk.models.wan_vae import decode, encode, load_vae, make_vae
from lltk.stream.text import TextEncoder
from lltk.train.folder import FolderClips


class PipelineEncoder:
    """A pipeline's autoencoder and text encoder.

    Args:
        pipeline: folder with ``vae``, ``text_encoder`` and ``tokenizer``.
        text_tokens: tokens a prompt is padded to.
        device: where they run and leave their results.
        dtype: what the autoencoder computes in.

    Raises:
        ValueError: the folder lacks a part, or one cannot be read.
    """

    def __init__(
        self, pipeline: Path, text_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._text = TextEncoder(pipeline, text_tokens, device=device)
        self._embeddings: dict[str, Tensor] = {}
        vae = load_vae(pipeline)
        weights = {name: weight.to(device, dtype) for name, weight in vae.weights.items()}
        self._vae = make_vae(vae.config or {}, weights)
        self._device = device

    @property
    def stride(self) -> int:
        """Video frames a latent frame."""
        stride: int = self._vae.config.scale_factor_temporal
        return stride

    def latents(self, video: Tensor) -> Tensor:
        """Normalised latents, float32 [B, C, F, h, w], of a video [B, 3, 1 + k·stride, H, W]."""
        return encode(self._vae, video.to(self._device))

    @torch.no_grad()
    def video(self, latents: Tensor) -> Tensor:
        """The video, float32 [B, 3, 1 + k·stride, H, W] in [-1, 1], of normalised latents."""
        return decode(self._vae, latents.to(self._device))

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings, float32 [n, S, E]; each prompt is encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if new:
            self._embeddings |= zip(new, self._text.encode(new), strict=True)
        return torch.stack([self._embeddings[prompt] for prompt in prompts])


class FolderLatents:
    """A folder's clips as ``latents`` [B, C, F, h, w], normalised, with ``text`` [B, N, S, E], one
    prompt a chunk, and ``opens``, bool [B, N], whether a shot begins.

    Args:
        folder, fps, shots: as `FolderClips` has them.
        geometry: of the Program to train.
        encoder: what makes latents and text.

    Raises:
        ValueError: as `FolderClips`.
    """

    def __init__(
        self, folder: Path, geometry: Geometry, fps: float, shots: int, encoder: PipelineEncoder
    ) -> None:
        self._clips = FolderClips(folder, geometry, fps, shots, encoder.stride)
        self._encoder = encoder

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        latents, text, opens = [], [], []
        for index in indices:
            sample = self._clips.sample(seed, index)
            video = sample.video.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            latents.append(self._encoder.latents(video))
            text.append(self._encoder.text(sample.prompts))
            opens.append(torch.tensor(sample.opens))
        return {
            "latents": torch.cat(latents),
            "text": torch.stack(text),
            "opens": torch.stack(opens),
        }
