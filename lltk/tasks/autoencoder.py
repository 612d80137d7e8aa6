"""Training an autoencoder on videos of the tiny world."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lltk.artefact import versions
from lltk.graph.program import LogEntry
from lltk.models import wan_vae
from lltk.models.configs import named_config
from lltk.models.tiny.world import FPS
from lltk.parallel.mesh import ALONE, Mesh
from lltk.stream.video import write_video
from lltk.tasks.clips import TinyVideos
from lltk.train.data import Batches, Dataset
from lltk.train.objective import Objective
from lltk.train.progress import Note, silent
from lltk.train.recipe import DataSection, TrainSection, VaeRecipe, vae_recipe
from lltk.train.vae import Reconstruction, decode, latent_statistics

_STATISTICS_CLIPS = 64
_SAMPLE_CLIPS = 4


@dataclass(frozen=True)
class AutoencoderPlan:
    """A `lltk.training.TrainingPlan` for a recipe with a ``vae`` section.

    Attributes:
        recipe: what it was made from.
        config: AutoencoderKLWan's arguments.
        device: where it trains.
    """

    recipe: VaeRecipe
    config: Mapping[str, Any]
    device: torch.device

    @property
    def section(self) -> TrainSection:
        return self.recipe.train

    @property
    def sequence(self) -> int:
        return 1

    @property
    def log(self) -> Sequence[LogEntry]:
        return ()

    @property
    def origin(self) -> str:
        return "random"

    @property
    def about(self) -> Mapping[str, Any]:
        recipe = self.recipe.model_dump(mode="json")
        return {"recipe": recipe, "log": [], "versions": versions()}

    @property
    def memory(self) -> Mapping[str, int]:
        with torch.device("meta"):
            size = 4 * sum(p.numel() for p in wan_vae.build(self.config).parameters())
        memory = {"weights": size, "gradients": size, "AdamW moments": 2 * size}
        if self.section.ema_decay is not None:
            memory["average"] = size
        return memory

    def ways_to_fit(self, room: int) -> Sequence[str]:
        return ()

    def check_clips(self) -> None:
        """The tiny world's need no files."""

    def dataset(self, note: Note = silent, mesh: Mesh = ALONE) -> Dataset:
        return TinyVideos(self.recipe.vae.frames, 1, self.section.data.shots, self.device)

    def objective(self, dataset: Dataset) -> Objective:
        vae = self.recipe.vae
        torch.manual_seed(self.section.seed)
        model = wan_vae.build(self.config)
        start = {name: parameter.detach() for name, parameter in model.named_parameters()}
        # diffusers' own `to` warns of modules that stay in float32 where there are none.
        model = nn.Module.to(copy.deepcopy(model), self.device, getattr(torch, vae.dtype))
        return Reconstruction(model, vae, start, self.section.graphs)

    def export(
        self,
        objective: Objective,
        dataset: Dataset,
        trained: Mapping[str, Tensor],
        folder: Path,
        overwrite: bool = False,
    ) -> Path:
        """Write ``vae/``, with the mean and standard deviation of its latents measured."""
        model: Any = wan_vae.make_vae(self.config, trained)
        batches = Batches(dataset, ~self.section.seed, objective.clips)
        some = islice(batches, -(-_STATISTICS_CLIPS // objective.clips))
        mean, std = latent_statistics(model, (batch.tensors["video"] for batch in some))
        measured = {**self.config, "latents_mean": mean, "latents_std": std}
        own = {name: tensor.cpu() for name, tensor in trained.items()}
        wan_vae.save_vae(folder / "vae", own, measured, overwrite)
        return folder / "vae"

    def write_samples(
        self, objective: Objective, dataset: Dataset, folder: Path | None, note: Note = silent
    ) -> None:
        """Write ``reconstructions.mp4``: held-out clips, and their reconstructions below them."""
        if folder is None:  # a rank by itself makes them
            return
        model: Any = objective.module
        video = dataset.batch(~self.section.seed, range(_SAMPLE_CLIPS))["video"]
        seen = decode(model, model.encode(video.to(model.dtype)).latent_dist.mean).float()
        rows = torch.cat([torch.cat(tuple(clips), dim=-1) for clips in (video, seen)], dim=-2)
        write_video(folder / "reconstructions.mp4", rows, FPS)


def plan_autoencoder(data: Mapping[str, Any], device: torch.device, where: str) -> AutoencoderPlan:
    """The plan of a recipe's plain data; errors begin with ``where``.

    Raises:
        ValueError: the recipe does not fit, or sets a key that is for transformers.
    """
    recipe = vae_recipe(data, where)
    section, named = recipe.train, recipe.vae.config
    config = named_config(named, wan_vae.CONFIGS) if isinstance(named, str) else named
    config = wan_vae.validate_config(config, f"{where}: vae.config")
    section.calls(recipe.vae.batch)
    if section.shards > 1:
        raise ValueError(f"{where}: train.shards: is for transformers; remove it")
    for option in ("compile", "recompute"):
        if getattr(section, option):
            raise ValueError(f"{where}: train.{option}: is for transformers; remove it")
    defaults = DataSection.model_validate({})
    for key in ("folder", "clips", "prepared", "encoding"):
        if getattr(section.data, key) != getattr(defaults, key):
            raise ValueError(
                f"{where}: train.data.{key}: an autoencoder trains on new clips of the tiny world "
                "at every step; remove it"
            )
    return AutoencoderPlan(recipe, config, device)
