"""The clips that a recipe trains on: those of the tiny world, or of a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lltk.graph.geometry import Geometry
from lltk.models.tiny.world import RESOLUTION, STRIDE, Story, draw_story, render
from lltk.parallel.mesh import ALONE, Mesh
from lltk.stream.script import SCENE_CUT
from lltk.tasks.encoder import PipelineEncoder
from lltk.train.assembly import Rules
from lltk.train.data import Dataset, Kept, first_samples, generator_at, in_epochs
from lltk.train.folder import FolderClips, Sample
from lltk.train.longlive import LongLiveClips
from lltk.train.progress import Note, silent
from lltk.train.prompts import PromptFiles
from lltk.train.read_ahead import ReadAhead, Samples
from lltk.train.recipe import TrainSection


class TinyVideos:
    """Clips of the tiny world as ``video``, float32 [B, 3, F, H, W] in [-1, 1].

    Args:
        frames: video frames of a clip, 1 + 4·k.
        chunk: latent frames in a chunk; a shot begins where a chunk does.
        shots: most shots in a clip. A clip has 1 to this many, all equally likely.
        device: where clips are rendered.
    """

    def __init__(self, frames: int, chunk: int, shots: int, device: torch.device) -> None:
        self._sizes = (frames, chunk)
        self._shots = shots
        self._device = device

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        return {"video": self.videos(self.stories(seed, indices))}

    def stories(self, seed: int, indices: range) -> list[Story]:
        """What these samples show."""
        frames, chunk = self._sizes
        stories = []
        for index in indices:
            generator = generator_at(seed, "story", index)
            shots = int(torch.randint(1, self._shots + 1, (), generator=generator))
            stories.append(draw_story(generator, frames, shots, chunk))
        return stories

    def videos(self, stories: Sequence[Story]) -> Tensor:
        """The videos of stories, as `batch` has them."""
        return render(stories, self._device).transpose(1, 2)


class Clips(Dataset, Protocol):
    """Clips that are encoded when they are asked for.

    Attributes:
        block: how many are encoded at once, if that many are asked for.
    """

    block: int

    def described(
        self, seed: int, indices: range
    ) -> tuple[dict[str, Tensor], list[tuple[str, ...]]]:
        """The batch of these samples, and each sample's prompts, one a chunk."""


class TinyLatents:
    """Clips of the tiny world, encoded.

    A batch holds

    - ``latents`` [B, C, F, h, w], normalised;
    - ``text`` [B, N, S, E], one prompt a chunk: the caption of its shot, after the scene-cut prefix
      where a shot opens that is not the first;
    - ``opens``, bool [B, N], true where a chunk opens a shot.

    Args:
        geometry: has chunk, latent frames, height and width of a clip.
        shots: as for `TinyVideos`.
        encoder: makes latents and text.
        device: where clips are rendered.
        ranks: how many of the group ``sequence`` encode each batch together. All must ask for the
            same batches.
        first: whether only the first frames are encoded, each rank for itself; F is 1 then.

    Raises:
        ValueError: the geometry's height or width is not the world's.
    """

    block = 64

    def __init__(
        self,
        geometry: Geometry,
        shots: int,
        encoder: PipelineEncoder,
        device: torch.device,
        ranks: int = 1,
        first: bool = False,
    ) -> None:
        if (geometry.height, geometry.width) != (RESOLUTION, RESOLUTION):
            raise ValueError(
                f"geometry: the tiny world is {RESOLUTION}×{RESOLUTION} pixels, not "
                f"{geometry.height}×{geometry.width}; set geometry.height and geometry.width, or "
                "name clips of your own in train.data.folder"
            )
        frames = STRIDE * (geometry.frames - 1) + 1
        self._videos = TinyVideos(frames, geometry.chunk, shots, device)
        self._encoder = encoder
        self._ranks = 1 if first else ranks
        self._first = first

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        return self.described(seed, indices)[0]

    def described(
        self, seed: int, indices: range
    ) -> tuple[dict[str, Tensor], list[tuple[str, ...]]]:
        stories = self._videos.stories(seed, indices)
        prompts = [tuple(story.prompts(SCENE_CUT)) for story in stories]
        every = [prompt for each in prompts for prompt in each]
        text = self._encoder.text(every).unflatten(0, (len(stories), -1))
        videos = self._videos.videos(stories)
        latents = self._encoder.latents(videos[:, :, :1] if self._first else videos, self._ranks)
        chunks = range(text.shape[1])
        opens = torch.tensor([[chunk in story.opens for chunk in chunks] for story in stories])
        return {"latents": latents, "text": text, "opens": opens}, prompts


class FolderLatents:
    """A folder's clips, encoded. A batch holds the same as that of `TinyLatents`.

    The next clips are read from disk while the model trains on those before.

    Where samples may end with padding, it also holds ``valid``, bool [B, F], false for padding.

    Args:
        clips: the folder's.
        encoder: makes latents and text.
        ranks, first: as for `TinyLatents`.
    """

    block = 1

    def __init__(
        self,
        clips: Samples[Sample],
        encoder: PipelineEncoder,
        ranks: int = 1,
        first: bool = False,
    ) -> None:
        self._clips = ReadAhead(clips)
        self._encoder = encoder
        self._ranks = 1 if first else ranks
        self._first = first

    def ahead(self, seed: int, indices: range) -> None:
        self._clips.ahead(seed, indices)

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        return self.described(seed, indices)[0]

    def described(
        self, seed: int, indices: range
    ) -> tuple[dict[str, Tensor], list[tuple[str, ...]]]:
        prompts, latents, text, opens, valid = [], [], [], [], []
        for index in indices:
            sample = self._clips.sample(seed, index)
            video = sample.video.permute(3, 0, 1, 2)[None, :, : 1 if self._first else None]
            latents.append(self._encoder.latents(video, self._ranks))
            prompts.append(sample.prompts)
            text.append(self._encoder.text(sample.prompts))
            opens.append(torch.tensor(sample.opens))
            if sample.valid is not None:
                valid.append(torch.arange(latents[-1].shape[2]) < sample.valid)
        batch = {
            "latents": torch.cat(latents),
            "text": torch.stack(text),
            "opens": torch.stack(opens),
        }
        return batch | ({"valid": torch.stack(valid)} if valid else {}), prompts


class PromptTexts:
    """Prompts without clips. A batch holds ``text`` and ``opens``, as that of `TinyLatents`.

    In each epoch every video's prompts are asked for once, in an order of its own. Held-out samples
    are the videos in their order.

    Args:
        files: the prompts.
        seed: of the samples that train.
        encoder: makes text.
    """

    def __init__(self, files: PromptFiles, seed: int, encoder: PipelineEncoder) -> None:
        self._files = files
        self._seed = seed
        self._encoder = encoder

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        count = len(self._files)
        held_out = [index % count for index in indices]
        numbers = in_epochs(seed, count, indices) if seed == self._seed else held_out
        prompts, opens = zip(*map(self._files.video, numbers), strict=True)
        text = self._encoder.text([prompt for each in prompts for prompt in each])
        return {"text": text.unflatten(0, (len(numbers), -1)), "opens": torch.tensor(opens)}


def encoded_clips(
    section: TrainSection,
    geometry: Geometry,
    encoder: PipelineEncoder,
    device: torch.device,
    note: Note = silent,
    mesh: Mesh = ALONE,
    first: bool = False,
) -> Dataset:
    """The clips that ``train.data`` names, encoded.

    New clips are encoded by the ranks that share them, each its own frames. Those that are kept are
    divided among all ranks.

    Args:
        section: names the clips, and the seed of those that are encoded once.
        geometry: of the Program that trains. ``train.data.frames`` replaces its frames.
        encoder: makes latents and text.
        device: where clips of the tiny world are rendered.
        note: told how many of a folder's samples are looked at, and of the clips that are kept,
            encoded.
        mesh: the ranks that train together, which all call this.
        first: whether only the clips' first frames are encoded.

    Raises:
        ValueError: as `TinyLatents`, `FolderClips` and `LongLiveClips` raise it.
    """
    encoded = clips_by_ranks(section, geometry, encoder, device, note, first)
    new, count = encoded(mesh.sequence), section.data.clips
    if count is None:
        return new
    own = encoded(1)
    kept = first_samples(own, section.seed, count, own.block, note, mesh)
    return Kept(new, section.seed, kept)


def clips_by_ranks(
    section: TrainSection,
    geometry: Geometry,
    encoder: PipelineEncoder,
    device: torch.device,
    note: Note = silent,
    first: bool = False,
) -> Callable[[int], Clips]:
    """Makes the clips that ``train.data`` names, given how many ranks encode each batch together.

    Arguments and errors as `encoded_clips`'.
    """
    data = section.data
    geometry = clip_geometry(section, geometry)
    if data.folder is None:
        return partial(TinyLatents, geometry, data.shots, encoder, device, first=first)
    samples = folder_samples(section, geometry, encoder.stride, note)
    return partial(FolderLatents, samples, encoder, first=first)


def clip_geometry(section: TrainSection, geometry: Geometry) -> Geometry:
    """The geometry of a clip, of which a sample may be an excerpt.

    Args:
        section: whose ``train.data.frames`` replaces the geometry's frames.
        geometry: of the Program that trains.

    Raises:
        ValueError: the frames are no whole number of chunks, or fewer than the Program's; or the
            tiny world's shots do not fit into them.
    """
    data, chunk, least = section.data, geometry.chunk, geometry.frames
    frames = least if data.frames is None else data.frames
    if frames < least or frames % chunk:
        raise ValueError(
            f"train.data.frames: {frames} latent frames, but the program is for {least}, in chunks "
            f"of {chunk}; set it to a multiple of {chunk} that is at least {least}"
        )
    if data.folder is None and data.shots > frames // chunk:
        raise ValueError(
            f"train.data.shots: {data.shots} do not fit into a clip of {frames // chunk} chunks, "
            f"as each shot has one at least; set it to {frames // chunk} or less, or set a larger "
            "train.data.frames"
        )
    return geometry.model_copy(update={"frames": frames})


def folder_samples(
    section: TrainSection, geometry: Geometry, stride: int, note: Note = silent
) -> Samples[Sample]:
    """The samples of the folder that ``train.data`` names, put together as it says.

    Args:
        section: names the folder, and the seed of the samples that train.
        geometry: has the sizes of a sample.
        stride: video frames in a latent frame.
        note: told how many of the folder's samples are looked at.

    Raises:
        ValueError: as `FolderClips` and `LongLiveClips` raise it.
    """
    data = section.data
    folder = Path(data.folder or "")
    if data.longlive is None:
        return FolderClips(folder, geometry, data.fps, data.shots, stride, note)
    fps = Fraction(data.fps).limit_denominator(1001)
    rules = Rules(geometry.chunk, geometry.chunks, fps, stride, **data.longlive.model_dump())
    return LongLiveClips(folder, rules, geometry.height, geometry.width, section.seed, note)
