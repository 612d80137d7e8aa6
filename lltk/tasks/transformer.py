"""Training a transformer through its Program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lltk.artefact import versions
from lltk.compiler import transform, with_weights
from lltk.graph.facts import Ranks, Trainable
from lltk.graph.memory import estimate, total
from lltk.graph.module import instantiate
from lltk.graph.program import LogEntry, Program
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.models.checkpoint import save_checkpoint, save_lora
from lltk.models.families import family_of
from lltk.models.pipelines import find_pipeline, link_pipeline
from lltk.models.tiny.world import FPS
from lltk.ops.implementations import check_device
from lltk.parallel.mesh import ALONE, Mesh
from lltk.passes.lora import Adapters
from lltk.stream.text import weight_bytes
from lltk.stream.video import write_video
from lltk.tasks.clips import clip_geometry, encoded_clips
from lltk.tasks.encoder import PipelineEncoder, encoder_for
from lltk.tasks.fitting import ways_to_fit
from lltk.tasks.preparing import prepared_clips
from lltk.train.clip_files import check_clip_folder
from lltk.train.data import Dataset
from lltk.train.flow_matching import FlowMatching
from lltk.train.objective import Objective
from lltk.train.progress import Note, silent
from lltk.train.recipe import TrainSection, train_section
from lltk.train.sampling import sample

_WHOLE = "quantised weights"
"""The owner of memory that shards do not divide."""
_INSIDE = {
    (True, False): (4, 15),
    (True, True): (4, 5),
    (False, False): (4, 34),
    (False, True): (4, 24),
}
"""By whether blocks are compiled, and whether they keep what attention gives: tensors as wide as a
feed-forward layer, and as a block, that the backward pass of a recomputed block holds at once. They
were fitted to calls and steps of the 5B on an H200, as ``benchmarks/training.py`` and
``training_iteration.py`` measure them; what eager blocks save by keeping was not measured, and is
taken to be what compiled ones do."""
_SAVED = {2: (2, 40), 4: (2, 27)}
"""By the compute dtype's bytes: such tensors that a block keeps if it is not recomputed, as counted
by ``torch.autograd.graph.saved_tensors_hooks``. Compiled blocks keep fewer."""
_ATTENTIONS = 2
"""Attentions of a block whose results are kept: to the clip, and to the text."""
ADAPTERS = {"diffusers": "lora.safetensors", "peft": "lora", "longlive": "lora.pt"}
"""What adapters are written to, by layout."""
_SAMPLE_CLIPS = 4
_SAMPLE_STEPS = 4


@dataclass(frozen=True)
class TransformerPlan:
    """A `lltk.training.TrainingPlan` for a ``train`` or a ``reference`` Program.

    Attributes:
        recipe: what the Program was made from.
        section: the recipe's ``train`` section.
        program: with the weights of ``model.checkpoint``; without weights where it is null.
        device: where it trains.
    """

    recipe: Recipe
    section: TrainSection
    program: Program
    device: torch.device

    @property
    def sequence(self) -> int:
        return self.program.fact(Ranks).count

    @property
    def log(self) -> Sequence[LogEntry]:
        return self.program.log

    @property
    def origin(self) -> str:
        lora = self.recipe.model.lora
        weights = self.recipe.model.checkpoint or "random"
        return f"{weights}, with the adapters of {lora}" if lora else weights

    @property
    def about(self) -> Mapping[str, Any]:
        return {
            "recipe": self.program.recipe | {"train": self.section.model_dump(mode="json")},
            "log": [entry.plain() for entry in self.log],
            "versions": versions(),
        }

    @property
    def memory(self) -> Mapping[str, int]:
        memory = estimate(self.program)
        del memory["block inputs"]  # `_moments` knows whether they are kept
        float32 = memory.get("gradients", 0)
        if self.section.optimiser == "adamw_8bit":
            memory["AdamW moments"] //= 4
        if self.section.weights == "compute" or self.section.offload:
            memory["gradients"] = float32 * self.program.dtype.itemsize // 4
        elif self.program.dtype != torch.float32:
            memory["float32 weights"] = float32
        if self.section.offload:
            memory.pop("AdamW moments", None)
        elif self.section.ema_decay is not None:
            memory["average"] = float32
        for owner in memory.keys() - {_WHOLE}:
            memory[owner] //= self.section.shards
        return self._at_most(memory)

    def _at_most(self, held: Mapping[str, int]) -> dict[str, int]:
        """What is always held, with what passes and encoders add where they need most."""
        most = max(self._moments(held.get("gradients", 0)), key=total)
        every = {**held, **most, **self._encoders()}
        return {owner: size for owner, size in every.items() if size}

    def ways_to_fit(self, room: int) -> Sequence[str]:
        return ways_to_fit(self, room)

    def _moments(self, gradients: int) -> Iterator[dict[str, int]]:
        """What passes hold when a backward pass begins, when it leaves the blocks that keep what
        attention gives, and when it ends.

        It frees what a block has kept as it makes the block's gradients. A step of several calls
        begins the second with gradients, and CUDA graphs never free them.
        """
        section, layers = self.section, self.program.spec.layers
        early = gradients if section.graphs or self._calls > 1 else 0
        if not section.recompute:
            kept = self._wide(*_SAVED[self.program.dtype.itemsize])
            yield {"activations": layers * kept, "gradients": early}
            yield {"activations": kept, "gradients": gradients}
            return
        keeping = min(section.keep_attention, layers)
        for done in {0, min(keeping, layers - 1), layers - 1}:
            yield {
                "block inputs": (layers - done) * self._wide(0, 1),
                "inside a block": self._wide(*_INSIDE[section.compile, done < keeping]),
                "attention's results": max(keeping - done, 0) * self._kept_attention(),
                "gradients": max(early, gradients * done // layers),
            }
        yield {"gradients": gradients}

    @property
    def _calls(self) -> int:
        return self.section.calls(self.recipe.geometry.batch)

    def _kept_attention(self) -> int:
        """Bytes that a block keeps of its attentions: results, and a float32 for each head."""
        spec = self.program.spec
        size = spec.head_dim * self.program.dtype.itemsize + torch.float32.itemsize
        return _ATTENTIONS * self._tokens * spec.heads * size

    def _encoders(self) -> dict[str, int]:
        """What encodes clips and captions."""
        if self.section.data.prepared is not None and self.section.sample_every is None:
            return {}
        return {
            part.replace("_", " "): self._encoder_bytes(part) for part in ("vae", "text_encoder")
        }

    def _wide(self, wide: int, narrow: int) -> int:
        """Bytes of so many tensors as wide as a feed-forward layer, and as a block."""
        spec = self.program.spec
        width = wide * self._config["ffn_dim"] + narrow * spec.heads * spec.head_dim
        return self._tokens * width * self.program.dtype.itemsize

    @property
    def _tokens(self) -> int:
        """Tokens of a call on one rank, clean and noisy."""
        geometry = self.program.geometry
        frames = geometry.captured_frames(self.program.kind) // self.sequence
        return geometry.batch * frames * geometry.frame_tokens(self.program.spec)

    def _encoder_bytes(self, part: str) -> int:
        """Bytes of what encodes clips or captions; 0 where its files are not there."""
        name = self.section.data.pipeline
        if name is None:
            return 0
        return weight_bytes(find_pipeline(name, needed=False) / part, self.program.dtype)

    def check_clips(self) -> None:
        data = self.section.data
        if data.prepared is not None:
            prepared_clips(self.recipe, self.section)
        elif data.folder is not None:
            check_clip_folder(Path(data.folder))

    def dataset(self, note: Note = silent, mesh: Mesh = ALONE) -> Dataset:
        # Encoding clips takes long, so what the device cannot run is refused before it.
        check_device(self.program.implementations, self.device)
        if self.section.data.prepared is not None:
            return prepared_clips(self.recipe, self.section, mesh)
        geometry, encoder = self.recipe.geometry, self._encoder()
        return encoded_clips(self.section, geometry, encoder, self.device, note, mesh)

    def objective(self, dataset: Dataset) -> Objective:
        program, section = self.program, self.section
        if self.recipe.model.checkpoint is None:
            torch.manual_seed(section.seed)
            model = family_of(program.kind).build(self._config)
            program = with_weights(program, model.state_dict())
        module = instantiate(program, self.device)
        if section.recompute:
            module.recompute_blocks(section.keep_attention)
        if section.compile:
            module.compile_blocks()
        return FlowMatching(
            program,
            module,
            section.image,
            section.context_error,
            section.context_noise,
            section.gap,
            section.graphs,
            section.error_recycling,
        )

    def export(
        self,
        objective: Objective,
        dataset: Dataset,
        trained: Mapping[str, Tensor],
        folder: Path,
        overwrite: bool = False,
    ) -> Path:
        """Write one of `ADAPTERS` where adapters trained; else ``transformer/``.

        ``pipeline/`` has links to it and to the other parts of the pipeline that it trained with.
        """
        own = {name: tensor.cpu() for name, tensor in trained.items()}
        if self.program.fact(Trainable).names is not None:
            layout = self.section.adapter
            path = folder / ADAPTERS[layout]
            adapters = self.program.fact(Adapters)
            stated = {
                "r": adapters.rank,
                "lora_alpha": adapters.alpha,
                "target_modules": adapters.modules,
            }
            save_lora(path, own, layout, stated, overwrite)
            return path
        weights = self.program.unmap_state({**objective.weights, **own})
        path = folder / "transformer"
        save_checkpoint(path, weights, "diffusers", self._config, overwrite=overwrite)
        if self.section.data.pipeline is not None:
            link_pipeline(folder / "pipeline", path, find_pipeline(self.section.data.pipeline))
        return path

    def write_samples(
        self, objective: Objective, dataset: Dataset, folder: Path | None, note: Note = silent
    ) -> None:
        """Write ``samples.mp4``: clips from noise, side by side, with held-out clips' captions."""
        module: Any = objective.module
        text = dataset.batch(~self.section.seed, range(objective.clips))["text"]
        text = text[:, : self.recipe.geometry.chunks].to(self.device)
        latents = sample(self.program, module, text, _SAMPLE_STEPS, self.section.seed, note)
        if folder is None:
            return
        video = self._encoder().video(latents[:_SAMPLE_CLIPS])
        data = self.section.data
        fps = FPS if data.folder is None else data.fps
        write_video(folder / "samples.mp4", torch.cat(tuple(video), dim=-1), fps)

    @property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.program.recipe["model"]["config"]
        return config

    def _encoder(self) -> PipelineEncoder:
        dtype = self.program.dtype
        return encoder_for(self.section.data, self.recipe.geometry, self.device, dtype)


def plan_transformer(data: Mapping[str, Any], device: torch.device, where: str) -> TransformerPlan:
    """The plan of a recipe's plain data; errors begin with ``where``.

    Raises:
        ValueError: the recipe or its checkpoint does not fit, or there is no train section.
    """
    recipe = parse_recipe(data, where)
    section = train_section(recipe.train, where)
    section.calls(recipe.geometry.batch)
    if section.data.prompts is not None:
        raise ValueError(
            f"{where}: train.data.prompts: a model trains on clips; name them in "
            "train.data.folder, or distil it with a distil section"
        )
    clip_geometry(section, recipe.geometry)
    if recipe.model.checkpoint is None and not section.from_scratch:
        raise ValueError(
            f"{where}: model.checkpoint: names no weights to begin with; set "
            "model.checkpoint=PATH, or begin with random ones by --from-scratch"
        )
    if recipe.model.lora is not None and recipe.model.checkpoint is None:
        raise ValueError(
            f"{where}: model.lora: there are no weights to add it to; name them in model.checkpoint"
        )
    program = transform(recipe, weights=recipe.model.checkpoint is not None)
    check_adapter(program, section, where)
    return TransformerPlan(recipe, section, program, device)


def check_adapter(program: Program, section: TrainSection, where: str) -> None:
    """Check that what trains can be written in the layout that ``train.adapter`` names.

    Raises:
        ValueError: it has no place for the scale, or no adapters train.
    """
    adapters = program.fact(Adapters)
    if section.adapter != "diffusers" and not adapters.modules:
        raise ValueError(
            f"{where}: train.adapter: {section.adapter}, but no adapters train; remove it, or add "
            "lora to the passes"
        )
    if section.adapter == "longlive" and adapters.alpha != adapters.rank:
        raise ValueError(
            f"{where}: train.adapter: longlive means a scale of 1, and lora has alpha "
            f"{adapters.alpha:g} of rank {adapters.rank}; set "
            f"passes.lora.alpha={adapters.rank}, or train.adapter=diffusers"
        )
