"""The clips that a recipe trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lltk.bench.quality import prompts_of
from lltk.cli.latents import FolderLatents, PipelineEncoder
from lltk.graph.geometry import Geometry
from lltk.models.pipelines import find_pipeline
from lltk.models.tiny.world import RESOLUTION, STRIDE, Story, draw_story, render
from lltk.train.data import Dataset, Kept, generator_at
from lltk.train.recipe import DataSection, TrainSection


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
    [B, N, S, E]: the caption of each chunk's shot, marked where a shot but the first begins; and
    ``opens``, bool [B, N]: whether a shot begins.

    Args:
        geometry: of the Program to train.
        shots: as `TinyVideos` has them.
        encoder: what makes latents and text.
        device: where clips are rendered.

    Raises:
        ValueError: the geometry is not the world's.
    """

    def __init__(
        self,
        geometry: Geometry,
        shots: int,
        encoder: PipelineEncoder,
        device: torch.device,
    ) -> None:
        if (geometry.height, geometry.width) != (RESOLUTION, RESOLUTION):
            raise ValueError(
                f"geometry: the tiny world is {RESOLUTION}×{RESOLUTION} pixels, not "
                f"{geometry.height}×{geometry.width}; set geometry.height and geometry.width"
            )
        frames = STRIDE * (geometry.frames - 1) + 1
        self._videos = TinyVideos(frames, geometry.chunk, shots, device)
        self._encoder = encoder

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        stories = self._videos.stories(seed, indices)
        text = self._encoder.text([prompt for story in stories for prompt in prompts_of(story)])
        latents = self._encoder.latents(self._videos.videos(stories))
        text = text.unflatten(0, (len(stories), -1))
        chunks = range(text.shape[1])
        opens = torch.tensor([[chunk in story.opens for chunk in chunks] for story in stories])
        return {"latents": latents, "text": text, "opens": opens}


def encoder_for(
    data: DataSection, geometry: Geometry, device: torch.device, dtype: torch.dtype
) -> PipelineEncoder:
    """The pipeline that a recipe's ``train.data`` names, for a Program of this geometry and dtype.

    Raises:
        ValueError: none is named, or as `PipelineEncoder`.
    """
    if data.pipeline is None:
        raise ValueError(
            "train.data.pipeline: names no folder; set it to one with vae, text_encoder and "
            "tokenizer"
        )
    return PipelineEncoder(find_pipeline(data.pipeline), geometry.text_tokens, device, dtype)


def dataset_for(
    section: TrainSection, geometry: Geometry, encoder: PipelineEncoder, device: torch.device
) -> Dataset:
    """The clips that ``train.data`` names; errors as `TinyLatents` or `FolderLatents`."""
    data = section.data
    if data.frames is not None:
        geometry = geometry.model_copy(update={"frames": data.frames})
    clips: Dataset
    if data.folder is None:
        clips = TinyLatents(geometry, data.shots, encoder, device)
    else:
        clips = FolderLatents(Path(data.folder), geometry, data.fps, data.shots, encoder)
    return clips if data.clips is None else Kept(clips, section.seed, data.clips)
