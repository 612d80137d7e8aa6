"""Distillation as a training objective: the student's, with its critic beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.train.data import Batch
from lltk.train.distribution_matching import (
    Noised,
    Score,
    Scores,
    critic_loss,
    direction,
    student_loss,
)
from lltk.train.noise_levels import LEVELS, score_levels
from lltk.train.objective import Critic
from lltk.train.recipe import TrainSection
from lltk.train.share import Share
from lltk.train.simulation import Scene, Simulation


class FakeScore:
    """The critic's objective: to predict the velocity of clips that the student makes.

    It makes them from the run's prompts, with noise of their own. Its batches are as large as the
    student's.

    Args:
        program: of the score, with adapters and weights.
        score: the same, runnable.
        simulation: makes the clips.
    """

    memory = None
    critic = None
    work = None

    def __init__(self, program: Program, score: Score, simulation: Simulation) -> None:
        self._program = program
        self.score = score
        self._simulation = simulation
        self._share = Share(program)

    @property
    def module(self) -> ProgramModule:
        return self.score.module

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return self._program.weights

    @property
    def clips(self) -> int:
        return self._program.geometry.batch

    def count(self, batch: Batch) -> int:
        return _count(self._simulation, batch)

    def loss(self, batch: Batch) -> Tensor:
        made, noise, noised, scene = self._given(batch)
        velocity = self.score(noised, scene.text, scene.positions)
        return self._share.counted(critic_loss(velocity, made, noise, scene), axis=1).sum()

    def weights_changed(self) -> None:
        """Nothing follows from the adapters."""

    @torch.no_grad()
    def first_bad(self, batch: Batch) -> str | None:
        made, _, noised, scene = self._given(batch)
        velocity = self.score(noised, scene.text, scene.positions)
        looked_at = (("the student's clip", made), ("the fake score", velocity))
        return _first_bad(looked_at, self._program.geometry.chunks)

    @torch.no_grad()
    def _given(self, batch: Batch) -> tuple[Tensor, Tensor, Noised, Scene]:
        """Clips made from a batch, their noise, what becomes of them, and their scene."""
        scene = self._simulation.scene(batch, "critic")
        made = self._simulation.clips(batch, "critic", scene)
        return made, *_noised(made, batch, "critic", scene), scene


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
        fake: the fake score.
        section: of the run, with the fake score's learning rate.
        updates: of the fake score, for each of the student's.
        lead: its updates before the student's first. They are a warm-up in themselves.
        negative: the real score's negative prompt, [S, E].
        guidance: of the real score.
    """

    memory = None
    work = None

    def __init__(
        self,
        program: Program,
        module: ProgramModule,
        simulation: Simulation,
        real: Score,
        fake: FakeScore,
        section: TrainSection,
        updates: int,
        lead: int,
        negative: Tensor,
        guidance: float,
    ) -> None:
        self._program = program
        self.module = module
        self.simulation = simulation
        self._real = real
        self._fake = fake
        warmup = 0 if lead else section.warmup
        own = section.model_copy(update={"ema_decay": None, "warmup": warmup})
        self.critic = Critic(fake, own, updates, lead, (real.module,))
        self._share = Share(program)
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
        return self._share.counted(student_loss(made, g, scene), axis=1).sum()

    def weights_changed(self) -> None:
        """Nothing follows from the adapters."""

    @torch.no_grad()
    def first_bad(self, batch: Batch) -> str | None:
        scene = self.simulation.scene(batch, "student")
        made = self.simulation.clips(batch, "student", scene)
        looked_at = self._looked_at(made, batch, scene)
        return _first_bad(looked_at, self._program.geometry.chunks)

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
        fake = self._fake.score
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


def _first_bad(looked_at: Iterable[tuple[str, Tensor]], chunks: int) -> str | None:
    """The first network, of those that made these clips in turn, with a value that is not finite;
    and the chunk."""
    for network, values in looked_at:
        finite = values.unflatten(2, (chunks, -1)).isfinite().all(dim=(0, 1, 3, 4, 5))
        if not finite.all():
            return f"{network}, chunk {int((~finite).nonzero()[0])}"
    return None
