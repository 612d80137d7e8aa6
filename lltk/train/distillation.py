"""Distillation as a training objective: the student's, with its critic beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lltk.graph.program import Program
from lltk.parallel.mesh import Mesh
from lltk.train.data import Batch, Batches
from lltk.train.distribution_matching import (
    Noised,
    Score,
    Scores,
    critic_loss,
    direction,
    student_loss,
)
from lltk.train.gradients import by_place, clip, total_norm
from lltk.train.loop import Diverged
from lltk.train.masters import Masters
from lltk.train.noise_levels import LEVELS, score_levels
from lltk.train.optimiser import Optimiser
from lltk.train.recipe import TrainSection
from lltk.train.simulation import Scene, Simulation


class Critic:
    """The fake score's training. It follows each of the student's updates.

    It predicts the velocity of clips that the student makes for it from the run's prompts, with
    noise of their own. Its batches are as large as the student's.

    Args:
        program: of the score, with adapters and weights.
        score: the same, runnable.
        simulation: makes the clips.
        batches: the prompts.
        section: of the run, with the critic's learning rate.
        updates: for each of the student's.
    """

    def __init__(
        self,
        program: Program,
        score: Score,
        simulation: Simulation,
        batches: Batches,
        section: TrainSection,
        updates: int,
    ) -> None:
        self.score = score
        self._simulation = simulation
        self._batches = batches
        self._section = section
        self._updates = updates
        self._calls = section.calls(program.geometry.batch)
        own = section.weights == "float32"
        self._masters = Masters(score.module, program.weights, lambda: None, own)
        self._optimiser = Optimiser(self._masters.parameters, section)
        self._done = 0

    def end_step(self, mesh: Mesh) -> Mapping[str, float]:
        """Update it as often as it is to be; gives its mean loss."""
        losses = [self._update() for _ in range(self._updates)]
        return {"critic": sum(losses) / len(losses)}

    def state(self) -> Mapping[str, Tensor]:
        optimiser = {f"optimiser.{name}": t.clone() for name, t in self._optimiser.parts()}
        weights = {f"weights.{name}": t for name, t in self._masters.copy().items()}
        return weights | optimiser | {"updates": torch.tensor(self._done)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        wanted = {"updates": torch.Size()}
        for name, master in self._masters.parameters.items():
            moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), master.shape)
            parts = moments | {"step": torch.Size()}
            wanted |= {f"optimiser.{key}.{name}": shape for key, shape in parts.items()}
            wanted[f"weights.{name}"] = master.shape
        if {name: tensor.shape for name, tensor in state.items()} != wanted:
            raise ValueError("memory: holds no critic of this recipe")
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("memory: the critic has values that no run gives")
        self._masters.load(_under("weights.", state))
        self._optimiser.load(_under("optimiser.", state))
        self._done = int(state["updates"])
        self._batches.position = self._done * self._section.batch

    def loss(self, batch: Batch) -> Tensor:
        """Its loss on clips made from a batch, summed over the frames that are not given."""
        scene = self._simulation.scene(batch, "critic")
        with torch.no_grad():
            made = self._simulation.clips(batch, "critic", scene)
        noise, noised = _noised(made, batch, "critic", scene)
        velocity = self.score(noised, scene.text, scene.positions)
        return critic_loss(velocity, made, noise, scene)

    def _update(self) -> float:
        batches = [next(self._batches) for _ in range(self._calls)]
        count = sum(_count(self._simulation, batch) for batch in batches)
        total = 0.0
        for batch in batches:
            part = self.loss(batch) / max(1, count)
            part.backward()
            self._masters.collect()
            total += float(part.detach())
        groups = by_place(self._masters.parameters.values())
        norm = total_norm(groups)
        if not math.isfinite(total + float(norm)):
            raise Diverged(
                f"the critic's update {self._done + 1}: its loss is {total}, its gradient's norm "
                f"{float(norm)}; lower distil.fake.lr or train.clip"
            )
        clip(groups, self._section.clip, norm)
        self._optimiser.step(self._section.rate(self._done // self._updates))
        self._masters.publish()
        self._done += 1
        return total


class Distillation:
    """Distribution matching: a student learns to make chunks in few passes.

    Clips are `lltk.train.simulation`'s, and formulas `lltk.train.distribution_matching`'s. In a
    call all first frames are given, or none. Noise levels of the scores are drawn for each clip, or
    for each chunk where first frames are given. A given frame counts in no loss.

    A batch holds ``text`` and ``opens`` for each chunk, and ``latents``, as `TinyLatents` has it.

    Args:
        program: the student's stream, with adapters and weights.
        module: the same Program, runnable.
        simulation: makes the student's clips.
        real: the real score.
        critic: the fake score, and its training.
        negative: the real score's negative prompt, [S, E].
        guidance: of the real score.
    """

    work = None

    def __init__(
        self,
        program: Program,
        module: nn.Module,
        simulation: Simulation,
        real: Score,
        critic: Critic,
        negative: Tensor,
        guidance: float,
    ) -> None:
        self._program = program
        self.module = module
        self.simulation = simulation
        self._real = real
        self.memory = critic
        self._negative = negative
        self._guidance = guidance

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return self._program.weights

    @property
    def clips(self) -> int:
        return self._program.geometry.batch

    def count(self, batch: Batch) -> int:
        return _count(self.simulation, batch)

    def loss(self, batch: Batch) -> Tensor:
        scene = self.simulation.scene(batch, "student")
        made = self.simulation.clips(batch, "student", scene)
        scores = self._scores(made, batch, scene)
        g, _ = direction(made, scores, self._program.geometry.chunks)
        return student_loss(made, g, scene).float()

    def weights_changed(self) -> None:
        """Nothing follows from the adapters."""

    @torch.no_grad()
    def first_bad(self, batch: Batch) -> str | None:
        scene = self.simulation.scene(batch, "student")
        made = self.simulation.clips(batch, "student", scene)
        for network, values in self._looked_at(made, batch, scene):
            chunks = values.unflatten(2, (self._program.geometry.chunks, -1))
            finite = chunks.isfinite().all(dim=(0, 1, 3, 4, 5))
            if not finite.all():
                return f"{network}, chunk {int((~finite).nonzero()[0])}"
        return None

    def _looked_at(self, made: Tensor, batch: Batch, scene: Scene) -> Iterator[tuple[str, Tensor]]:
        """What each network makes, in order."""
        yield "the student's clip", made
        scores = self._scores(made, batch, scene)
        yield "the real score", scores.conditional
        if scores.unconditional is not None:
            yield "the real score of the negative prompt", scores.unconditional
        yield "the fake score", scores.fake

    def _scores(self, made: Tensor, batch: Batch, scene: Scene) -> Scores:
        _, noised = _noised(made.detach(), batch, "student", scene)
        fake = self.memory.score
        return Scores.of(self._real, fake, noised, scene, self._negative, self._guidance)


def _count(simulation: Simulation, batch: Batch) -> int:
    """The frames of a batch's clips that are not given."""
    return len(batch.indices) * (simulation.frames - simulation.given(batch))


def _noised(made: Tensor, batch: Batch, purpose: str, scene: Scene) -> tuple[Tensor, Noised]:
    """The noise that is added to clips, and what becomes of them."""
    frames, chunks = made.shape[2], len(scene.opens)
    draws = batch.integers(f"{purpose} level", LEVELS, 1 if scene.image is None else chunks)
    spread = draws.repeat_interleave(frames // draws.shape[1], dim=1)
    timestep, sigma = (level.to(made.device) for level in score_levels(spread))
    noise = batch.normal(f"{purpose} score", *made.shape[1:], device=made.device)
    return noise, Noised.make(made, noise, timestep, sigma, scene)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
