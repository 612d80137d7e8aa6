"""What a recipe trains, put together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lltk.artefact import versions
from lltk.cli.datasets import TinyVideos, dataset_for, encoder_for
from lltk.compiler import transform, with_weights
from lltk.graph.files import written_whole
from lltk.graph.memory import estimate
from lltk.graph.module import instantiate
from lltk.graph.program import LogEntry
from lltk.graph.recipe import parse_recipe
from lltk.models import wan22, wan_vae
from lltk.models.checkpoint import save_checkpoint, save_lora
from lltk.models.configs import named_config
from lltk.models.tiny.world import FPS
from lltk.ops.implementations import check_device
from lltk.stream.video import VideoWriter, pixels
from lltk.train.data import Batches, Dataset
from lltk.train.objective import FlowMatching, Objective, mean_loss
from lltk.train.recipe import TrainSection, train_section, vae_recipe
from lltk.train.sampling import sample
from lltk.train.vae import Reconstruction, decode, latent_statistics

_VALIDATION_CLIPS = 16
_STATISTICS_CLIPS = 64
_SAMPLE_CLIPS = 4
_SAMPLE_STEPS = 4


@dataclass(frozen=True)
class Task:
    """What a recipe trains.

    Attributes:
        section: its train section.
        log: the passes that its Program went through; none of an autoencoder.
        about: what checkpoints say of it: recipe, pass log, versions.
        memory: bytes by owner.
        dataset: loads what makes the clips, and gives them.
        objective: makes what trains runnable, and gives what a step minimises.
        export: writes trained weights, by name, to a run's folder; gives their path.
        sample: writes samples of the module, with these clips, to a folder, if it can.
    """

    section: TrainSection
    log: Sequence[LogEntry]
    about: Mapping[str, Any]
    memory: Mapping[str, int]
    dataset: Callable[[], Dataset]
    objective: Callable[[], Objective]
    export: Callable[[Objective, Dataset, Mapping[str, Tensor], Path], Path]
    sample: Callable[[Objective, Dataset, Path], None] | None = None


def task_of(data: Mapping[str, Any], where: str, device: torch.device) -> Task:
    """The task of a recipe's plain data; ``where`` is named in errors.

    Raises:
        ValueError: the recipe does not fit, or has no train section.
    """
    task = _autoencoder if "vae" in data else _transformer
    made = task(data, where, device)
    if made.section.graphs and device.type != "cuda":
        raise ValueError(f"{where}: train.graphs: {device} has no CUDA graphs; set it to false")
    return made


def held_out_loss(objective: Objective, dataset: Dataset, section: TrainSection) -> float:
    """The loss over clips, of fixed noise, that training does not see; a folder's clips it does,
    but from other places in them."""
    batches = Batches(dataset, ~section.seed, objective.clips)
    return mean_loss(objective, islice(batches, -(-_VALIDATION_CLIPS // objective.clips)))


def _transformer(data: Mapping[str, Any], where: str, device: torch.device) -> Task:
    recipe = parse_recipe(data, where)
    section = train_section(recipe.train, where)
    section.calls(recipe.geometry.batch)
    program = transform(recipe, weights=recipe.model.checkpoint is not None)
    config = program.recipe["model"]["config"]
    about = {
        "recipe": program.recipe | {"train": section.model_dump(mode="json")},
        "log": [entry.plain() for entry in program.log],
        "versions": versions(),
    }
    memory = estimate(program)
    copy = memory.get("gradients", 0)
    if program.dtype != torch.float32:
        memory["float32 weights"] = copy
    if section.ema_decay is not None:
        memory["average"] = copy

    def dataset() -> Dataset:
        check_device(program.implementations, device)  # before clips are encoded
        encoder = encoder_for(section.data, recipe.geometry, device, program.dtype)
        return dataset_for(section, recipe.geometry, encoder, device)

    def objective() -> Objective:
        started = program
        if recipe.model.checkpoint is None:
            torch.manual_seed(section.seed)
            started = with_weights(program, wan22.build(config).state_dict())
        module = instantiate(started, device)
        if section.recompute:
            module.checkpoint_blocks()
        if section.compile:
            module.compile_blocks()
        return FlowMatching(
            started,
            module,
            section.image,
            section.context_error,
            section.context_noise,
            section.gap,
            section.graphs,
        )

    def export(
        objective: Objective, dataset: Dataset, trained: Mapping[str, Tensor], folder: Path
    ) -> Path:
        own = {name: tensor.cpu() for name, tensor in trained.items()}
        if program.trainable is not None:
            path = folder / "lora.safetensors"
            save_lora(path, own, "lltk")
            return path
        weights = program.unmap_state({**objective.weights, **own})
        with written_whole(folder / "transformer") as temporary:
            save_checkpoint(temporary, weights, "diffusers", config)
        return folder / "transformer"

    def write_samples(objective: Objective, dataset: Dataset, folder: Path) -> None:
        """Clips from noise, side by side; their captions are of held-out clips."""
        module: Any = objective.module
        text = dataset.batch(~section.seed, range(objective.clips))["text"]
        text = text[:, : recipe.geometry.chunks]
        latents = sample(program, module, text, _SAMPLE_STEPS, section.seed)
        encoder = encoder_for(section.data, recipe.geometry, device, program.dtype)
        video = encoder.video(latents[:_SAMPLE_CLIPS])
        fps = FPS if section.data.folder is None else section.data.fps
        _write(folder / "samples.mp4", torch.cat(tuple(video), dim=-1), fps)

    return Task(section, program.log, about, memory, dataset, objective, export, write_samples)


def _autoencoder(data: Mapping[str, Any], where: str, device: torch.device) -> Task:
    recipe = vae_recipe(data, where)
    section, vae = recipe.train, recipe.vae
    named = vae.config
    config = named_config(named, wan_vae.CONFIGS) if isinstance(named, str) else named
    config = wan_vae.validate_config(config, f"{where}: vae.config")
    section.calls(vae.batch)
    for option in ("compile", "recompute"):
        if getattr(section, option):
            raise ValueError(f"{where}: train.{option}: is for transformers; remove it")
    for key in ("folder", "clips"):
        if getattr(section.data, key) is not None:
            raise ValueError(
                f"{where}: train.data.{key}: an autoencoder trains on ever new clips of the world; "
                "remove it"
            )
    with torch.device("meta"):
        size = 4 * sum(p.numel() for p in wan_vae.build(config).parameters())
    memory = {"weights": size, "gradients": size, "AdamW moments": 2 * size}
    if section.ema_decay is not None:
        memory["average"] = size
    about = {"recipe": recipe.model_dump(mode="json"), "log": [], "versions": versions()}

    def dataset() -> Dataset:
        return TinyVideos(vae.frames, 1, section.data.shots, device)

    def objective() -> Objective:
        torch.manual_seed(section.seed)
        model = wan_vae.build(config)
        start = {name: parameter.detach() for name, parameter in model.named_parameters()}
        # Not diffusers' own `to`, which warns of modules to keep in float32 where there are none.
        model = nn.Module.to(copy.deepcopy(model), device, getattr(torch, vae.dtype))
        return Reconstruction(model, vae, start, section.graphs)

    def export(
        objective: Objective, dataset: Dataset, trained: Mapping[str, Tensor], folder: Path
    ) -> Path:
        model: Any = wan_vae.make_vae(config, trained)
        batches = Batches(dataset, ~section.seed, objective.clips)
        some = islice(batches, -(-_STATISTICS_CLIPS // objective.clips))
        mean, std = latent_statistics(model, (batch.tensors["video"] for batch in some))
        measured = config | {"latents_mean": mean, "latents_std": std}
        own = {name: tensor.cpu() for name, tensor in trained.items()}
        with written_whole(folder / "vae") as temporary:
            wan_vae.save_vae(temporary, own, measured)
        return folder / "vae"

    def write_samples(objective: Objective, dataset: Dataset, folder: Path) -> None:
        """Held-out clips side by side, their reconstructions below."""
        model: Any = objective.module
        video = dataset.batch(~section.seed, range(_SAMPLE_CLIPS))["video"]
        seen = decode(model, model.encode(video.to(model.dtype)).latent_dist.mean)
        seen = seen.float()
        rows = torch.cat([torch.cat(tuple(clips), dim=-1) for clips in (video, seen)], dim=-2)
        _write(folder / "reconstructions.mp4", rows, FPS)

    return Task(section, (), about, memory, dataset, objective, export, write_samples)


def _write(path: Path, video: Tensor, fps: float) -> None:
    """A video [3, F, H, W] in [-1, 1] as a file."""
    shown = pixels(video[None])
    _, height, width, _ = shown.shape
    with VideoWriter(path, height, width, fps) as writer:
        writer.write(shown)
