"""The clips that a recipe trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lltk.cli.latents import FolderLatents, PipelineEncoder
from lltk.graph.geometry import Geometry
from lltk.models.tiny.world import RESOLUTION, STRIDE, Story, draw_story, render
from lltk.models.wan_vae import encode, load_vae, make_vae
from lltk.stream.script import SCENE_CUT
from lltk.stream.text import TextEncoder
from lltk.train.data import Dataset, generator_at
from lltk.train.recipe import DataSection


class TinyVideos:
    """Clips of the tiny world: ``video``, float32 [B, 3, F, H, W] in [-1, 1].

    Args:
        frames: video frames, 1 + 4·k.
        chunk: latent frames between which a shot may begin.
        shots: most shots a clip; their number is uniform from 1.
        device: where clips are rendered.
    """

    def __init__(self, frames: int, chunk: int, shots: int, device: torch.device) -> None:
        self._sizes = (frames, chunk)
        self._shots = shots
        self._device = device

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        return {"video": self.videos(self.stories(seed, indices))}

    def stories(self, seed: int, indices: range) -> list[Story]:
        """What the samples show."""
        frames, chunk = self._sizes
        stories = []
        for index in indices:
            generator = generator_at(seed, "story", index)
            shots = int(torch.randint(1, self._shots + 1, (), generator=generator))
            stories.append(draw_story(generator, frames, shots, chunk))
        return stories

    def videos(self, stories: Sequence[Story]) -> Tensor:
        """The stories' videos."""
        return render(stories, self._device).transpose(1, 2)


class TinyLatents:
    """Clips of the tiny world as ``latents`` [B, C, F, h, w], normalised, with ``text``
    [B, N, S, E]: the caption of each chunk's shot, marked where a shot but the first begins.

    Args:
        geometry: of the Program to train.
        shots: most shots a clip; their number is uniform from 1.
        pipeline: folder with ``vae``, ``text_encoder`` and ``tokenizer``.
        device: where they run.

    Raises:
        ValueError: the geometry is not the world's, or the folder lacks a part.
    """

    def __init__(
        self, geometry: Geometry, shots: int, pipeline: Path, device: torch.device
    ) -> None:
        if (geometry.height, geometry.width) != (RESOLUTION, RESOLUTION):
            raise ValueError(
                f"geometry: the tiny world is {RESOLUTION}×{RESOLUTION} pixels, not "
                f"{geometry.height}×{geometry.width}; set geometry.height and geometry.width"
            )
        frames = STRIDE * (geometry.frames - 1) + 1
        self._videos = TinyVideos(frames, geometry.chunk, shots, device)
        self._encoder = TextEncoder(pipeline, geometry.text_tokens, device=device)
        self._embeddings: dict[str, Tensor] = {}
        vae = load_vae(pipeline)
        self._vae = make_vae(vae.config or {}, vae.weights).to(device)

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        stories = self._videos.stories(seed, indices)
        text = torch.stack([self._embedded(_prompts(story)) for story in stories])
        return {"latents": encode(self._vae, self._videos.videos(stories)), "text": text}

    def _embedded(self, prompts: list[str]) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if new:
            self._embeddings |= zip(new, self._encoder.encode(new), strict=True)
        return torch.stack([self._embeddings[prompt] for prompt in prompts])


def _prompts(story: Story) -> list[str]:
    """One a chunk."""
    return [
        (SCENE_CUT if chunk in story.opens[1:] else "") + story.captions[shot]
        for chunk, shot in enumerate(story.shot_of_chunk)
    ]


def dataset_for(data: DataSection, geometry: Geometry, device: torch.device) -> Dataset:
    """The clips that a recipe's ``train.data`` names, for a Program of this geometry.

    Raises:
        ValueError: no pipeline is named, or as `TinyLatents` or `FolderLatents`.
    """
    if data.pipeline is None:
        raise ValueError(
            "train.data.pipeline: names no folder; set it to one with vae, text_encoder and "
            "tokenizer"
        )
    pipeline = Path(data.pipeline)
    if data.folder is None:
        return TinyLatents(geometry, data.shots, pipeline, device)
    encoder = PipelineEncoder(pipeline, geometry.text_tokens, device)
    return FolderLatents(Path(data.folder), geometry, data.fps, data.shots, encoder)
