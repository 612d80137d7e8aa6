"""Distilling a stream into one of few passes, by networks over shared backbones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lltk.compiler import transform
from lltk.graph.facts import Ranks, Trainable
from lltk.graph.memory import estimate, total
from lltk.graph.module import ProgramModule, instantiate, same_weights
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.models.pipelines import find_pipeline
from lltk.ops.implementations import check_device
from lltk.parallel.mesh import ALONE, Mesh
from lltk.stream.recipe import StreamSection, stream_section
from lltk.stream.rollout import Rollout
from lltk.stream.sampler import Schedule
from lltk.stream.video import write_video
from lltk.tasks.clips import PromptTexts, encoded_clips
from lltk.tasks.fitting import MOST_RANKS, first_that_fit, sparing
from lltk.tasks.transformer import TransformerPlan, check_adapter
from lltk.train.data import Batch, Dataset
from lltk.train.distil_section import DistilSection, Passes, ScoreSection, distil_section
from lltk.train.distillation import Distillation, FakeScore
from lltk.train.distribution_matching import Score
from lltk.train.objective import Objective
from lltk.train.progress import Note, silent
from lltk.train.prompts import PromptFiles
from lltk.train.recipe import TrainSection, train_section
from lltk.train.simulation import Simulation, simulate

_SAMPLE_CLIPS = 4
_SCORES = ("canonicalise", "per_frame_timesteps", "frame_positions", "text_per_chunk")
_NOT_FOR_IT = (
    "from_scratch", "context_error", "context_noise", "error_recycling", "gap",
)  # fmt: skip
"""Keys of the train section that distillation has no use for."""


@dataclass(frozen=True)
class DistillationPlan(TransformerPlan):
    """A `lltk.training.TrainingPlan` for a recipe with a ``distil`` section.

    Its `program` is the student's stream.

    Attributes:
        distil: the recipe's ``distil`` section.
        stream: its ``stream`` section: the sampler's shift, φ and the negative prompt.
        real: the real score's Program, of which nothing trains.
        fake: the fake score's, with adapters.
    """

    distil: DistilSection
    stream: StreamSection
    real: Program
    fake: Program

    @property
    def origin(self) -> str:
        same = self.recipe.model.checkpoint
        real, fake = (each.weights or same for each in (self.distil.real, self.distil.fake))
        return f"{super().origin} (student), {real} (real score), {fake} (fake score)"

    @property
    def memory(self) -> Mapping[str, int]:
        student, both = self._adapters(self.program), self._adapters(self.program, self.fake)
        moments = 2 * both if self.section.optimiser == "adamw" else both // 2
        memory = {
            "weights": self._weights,
            "gradients": both,
            "AdamW moments": moments,
            "average": 0 if self.section.ema_decay is None else student,
        }
        if self.section.weights == "compute":
            memory["gradients"] = both * self.program.dtype.itemsize // 4
        elif self.program.dtype != torch.float32:
            memory["float32 weights"] = both
        memory = {owner: size // self.section.shards for owner, size in memory.items()}
        cache, geometry = estimate(self.program), self.program.geometry
        # A commit to a page that is in use leaves the old cache to the backward pass.
        copies = 1 + max(0, geometry.chunks - geometry.pages) + self.section.graphs
        memory["cache pages"] = copies * cache["cache pages"]
        memory["cross-attention K/V"] = geometry.chunks * cache["cross-attention K/V"]
        return self._at_most(memory)

    def check_clips(self) -> None:
        super().check_clips()
        self._prompts()

    def dataset(self, note: Note = silent, mesh: Mesh = ALONE) -> Dataset:
        files, section = self._prompts(), self.section
        if section.data.prepared is not None:
            return super().dataset(note, mesh)
        check_device(self.program.implementations, self.device)
        encoder = self._encoder()
        if files is not None:
            return PromptTexts(files, section.seed, encoder)
        geometry = self.recipe.geometry
        return encoded_clips(section, geometry, encoder, self.device, note, mesh, first=True)

    def _prompts(self) -> PromptFiles | None:
        """The prompts that ``train.data`` names; None where it names clips."""
        path = self.section.data.prompts
        return None if path is None else PromptFiles(Path(path), self.program.geometry.chunks)

    def ways_to_fit(self, room: int) -> Sequence[str]:
        return first_that_fit(room, sparing(self), self._divided())

    def _divided(self) -> Iterator[tuple[str, int]]:
        """The weights on ever more ranks."""
        ranks = 2 * self.section.shards
        while ranks <= MOST_RANKS:
            section = self.section.model_copy(update={"shards": ranks})
            needed = total(replace(self, section=section).memory)
            yield f"{ranks} ranks, --set train.shards={ranks}", needed
            ranks *= 2

    def objective(self, dataset: Dataset) -> Objective:
        made = list[tuple[Program, ProgramModule]]()
        for program in (self.real, self.fake, self.program):
            held = {
                name: module.get_parameter(name)
                for other, module in reversed(made)
                for name in same_weights(program, other)
            }
            made.append((program, instantiate(program, self.device, held=held)))
        (_, real), (_, fake), (_, student) = made
        for module in (fake, student) if self.section.recompute else ():
            module.recompute_blocks(self.section.keep_attention)
        for module in (real, fake, student) if self.section.compile else ():
            module.compile_blocks()
        offset, image = self.stream.shot_offset, self.section.image
        batch, steps, graphs = self.section.batch, self.distil.steps, self.section.graphs
        simulation = Simulation(
            self.program, student, steps, self.stream.shift, offset, image, batch,
            self.distil.exit, graphs,
        )  # fmt: skip
        section = self.section.model_copy(update={"lr": self.distil.fake.lr})
        negative = self._encoder().text([self.stream.negative_prompt])[0]
        negative = negative.to(self.device, self.program.dtype)
        return Distillation(
            self.program,
            student,
            simulation,
            Score(self.real, real, graphs),
            FakeScore(self.fake, Score(self.fake, fake, graphs), simulation),
            section,
            self.distil.fake.updates,
            self.distil.fake.lead,
            negative,
            self.distil.guidance,
        )

    def write_samples(
        self, objective: Objective, dataset: Dataset, folder: Path | None, note: Note = silent
    ) -> None:
        """Write ``samples.mp4``: clips of held-out prompts in the fewest passes, side by side."""
        assert isinstance(objective, Distillation)
        seed, clips = ~self.section.seed, range(objective.clips)
        scene = objective.simulation.scene(Batch(seed, clips, dataset.batch(seed, clips)), "sample")
        steps = min(self.distil.steps)
        schedule = Schedule.make(steps, self.stream.shift, self.device)
        latents = simulate(Rollout(self.program, objective.module), schedule, scene, steps)
        if folder is None:
            return
        video = self._encoder().video(latents[:_SAMPLE_CLIPS])
        write_video(folder / "samples.mp4", torch.cat(tuple(video), dim=-1), self.stream.fps)

    @property
    def _tokens(self) -> int:
        """Tokens of a call on one rank: of all chunks' exit passes, or of the critic's clip."""
        geometry = self.program.geometry
        frames = geometry.frames // self.sequence
        return geometry.batch * frames * geometry.frame_tokens(self.program.spec)

    @cached_property
    def _weights(self) -> int:
        """Bytes of all networks' weights, those that they share once."""
        total, before = 0, list[Program]()
        for program in (self.real, self.fake, self.program):
            held = {name for other in before for name in same_weights(program, other)}
            total += sum(
                tensor.numel() * program.run_dtype(name).itemsize
                for name, tensor in program.weights.items()
                if name not in held
            )
            before.append(program)
        return total

    def _adapters(self, *programs: Program) -> int:
        """Bytes of what trains, in float32."""
        return sum(
            4 * program.weights[name].numel()
            for program in programs
            for name in program.fact(Trainable).names or ()
        )


def plan_distillation(
    data: Mapping[str, Any], device: torch.device, where: str, weights: bool = True
) -> DistillationPlan:
    """The plan of a recipe's plain data; errors begin with ``where``.

    Args:
        data: the recipe.
        device: where it will train.
        where: what errors call the recipe.
        weights: whether to load them. If not, the plan is there to be looked at.

    Raises:
        ValueError: the recipe, its sections, a checkpoint or the networks' shapes do not fit.
    """
    recipe = parse_recipe(data, where)
    distil = distil_section(recipe.distil, where)
    section, stream = train_section(recipe.train, where), stream_section(recipe.stream, where)
    if recipe.program != "stream":
        raise ValueError(f"{where}: program: {recipe.program} is not distilled; name a stream")
    section.calls(recipe.geometry.batch)
    _check_section(section, where)
    _check_cuts(recipe, section, stream, where)
    if recipe.model.checkpoint is None and weights:
        pipeline = str(find_pipeline(stream.pipeline))
        model = recipe.model.model_copy(update={"checkpoint": pipeline})
        recipe = recipe.model_copy(update={"model": model})
    student = transform(recipe, weights=weights)
    _check_trains(student, f"{where}: passes")
    if student.turns_pages:
        raise ValueError(
            f"{where}: passes: bounded_positions is for streaming, and a student's clips are short "
            "and have absolute positions; remove it"
        )
    check_adapter(student, section, where)
    _check_exchange(recipe, where)
    if section.graphs and (section.shards > 1 or student.fact(Ranks).count > 1):
        raise ValueError(
            f"{where}: train.graphs: ranks exchange tensors in the calls that it would record; set "
            "it to false"
        )
    lora = next(step["lora"] for step in student.recipe["passes"] if "lora" in step)
    real = _score(recipe, student, distil.real, [], "distil.real", where, weights)
    fake = _score(recipe, student, distil.fake, [{"lora": lora}], "distil.fake", where, weights)
    _check_trains(fake, f"{where}: distil.fake.passes")
    real = replace(real, facts=real.facts | {Trainable: Trainable(frozenset())})
    return DistillationPlan(recipe, section, student, device, distil, stream, real, fake)


def _score(
    recipe: Recipe,
    student: Program,
    own: ScoreSection,
    more: Passes,
    name: str,
    where: str,
    weights: bool,
) -> Program:
    """A score network's Program, for the student's clips."""
    ranks = student.fact(Ranks).count
    shared: Passes = [{"balanced_sp": {"size": ranks}}] if ranks > 1 else []
    passes: Passes = [*_SCORES, "block_causal", *more, *shared, "regionalise", "lower"]
    model = {
        "config": recipe.model.config,
        "checkpoint": own.weights or recipe.model.checkpoint,
        "dtype": recipe.model.dtype,
    }
    data = {
        "program": "score",
        "model": model,
        "geometry": recipe.geometry.model_dump(),
        "passes": passes if own.passes is None else own.passes,
    }
    program = transform(parse_recipe(data, f"{where}: {name}"), weights=weights, section=name)
    ours, theirs = (each.recipe["model"]["config"] for each in (student, program))
    if differing := sorted(key for key in ours if ours[key] != theirs[key]):
        raise ValueError(
            f"{where}: {name}.weights: {model['checkpoint']} is of another shape than the student, "
            f"in {', '.join(differing)}; name weights of the same model"
        )
    if (found := program.fact(Ranks).count) != ranks:
        raise ValueError(
            f"{where}: {name}.passes: {found} ranks share a clip here, and {ranks} the student's "
            f"(ulysses_stream); set the size of balanced_sp to {ranks}"
        )
    return program


def _check_exchange(recipe: Recipe, where: str) -> None:
    """Refuse exchanges that gradients do not flow through."""
    for index, (name, options) in enumerate(recipe.steps()):
        if name != "ulysses_stream":
            continue
        for key, default in (("exchange", "fp8"), ("exchange_queries", "compute")):
            if options.get(key, default) != "compute":
                raise ValueError(
                    f"{where}: passes.{index}: ulysses_stream.{key}: no gradients flow through "
                    "values that are rounded to be sent; set "
                    f"passes.ulysses_stream.{key}=compute"
                )


def _check_trains(program: Program, where: str) -> None:
    """Refuse a network that should train and cannot."""
    if not program.fact(Trainable).names:
        raise ValueError(f"{where}: no adapters train; add lora, before regionalise")
    if any(name not in program.weights for name in program.fact(Trainable).names or ()):
        raise ValueError(
            f"{where}: adapters are quantised, and so cannot train; leave them out of the include "
            "of the pass that quantises"
        )


def _check_section(section: TrainSection, where: str) -> None:
    """Refuse keys that would do nothing."""
    for key in _NOT_FOR_IT:
        if getattr(section, key) != TrainSection.model_fields[key].default:
            raise ValueError(f"{where}: train.{key}: is not for distillation; remove it")
    if section.data.prompts is not None and section.image:
        raise ValueError(
            f"{where}: train.image: prompts have no first frames; name clips in train.data.folder "
            "instead of train.data.prompts, or set train.image=0"
        )
    if section.data.frames is not None:
        raise ValueError(
            f"{where}: train.data.frames: a clip has geometry.frames in distillation; remove it"
        )


def _check_cuts(recipe: Recipe, section: TrainSection, stream: StreamSection, where: str) -> None:
    """Refuse calls of several clips whose cuts would have to be at the same chunks."""
    geometry, data = recipe.geometry, section.data
    has_cuts = data.shots > 1 or data.longlive is not None or data.prompts is not None
    evicts = geometry.shot_sink and geometry.sink > 0 and geometry.frames > geometry.window
    if geometry.batch > 1 and has_cuts and (stream.shot_offset or evicts):
        reason = "stream.shot_offset" if stream.shot_offset else "geometry.shot_sink"
        raise ValueError(
            f"{where}: geometry.batch: {geometry.batch} clips of a call have cuts at different "
            f"chunks, which {reason} has act on them all; set geometry.batch=1 (train.batch adds "
            "calls up)"
        )
