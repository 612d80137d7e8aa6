"""The training loop."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lltk.files.outputs import Kind, Output
from lltk.files.writing import remove_unfinished, sync, write_text
from lltk.ops.hardware import bfloat16_flops
from lltk.parallel.mesh import ALONE, Mesh, local_part, whole
from lltk.stream.timing import Stopwatch
from lltk.stream.video import VIDEO
from lltk.train.data import Batches, Dataset, held_out
from lltk.train.metrics import (
    METRICS_FILE,
    Metrics,
    append_metrics,
    forget_after,
    plot_loss,
    read_metrics,
)
from lltk.train.objective import Objective, mean_loss
from lltk.train.plot import SVG
from lltk.train.progress import Note, noted, silent
from lltk.train.recipe import TrainSection
from lltk.train.saving import Parts, StateWriter
from lltk.train.shards import Divided, divided
from lltk.train.state import (
    STATES,
    check_recipe,
    check_training_state,
    load_training_state,
    random_state,
    restore_random_state,
    training_states,
)
from lltk.train.tensorboard import EVENTS, Board
from lltk.train.updates import NotFinite, Updates

METRICS = "metrics.jsonl"
PLOT = "loss.svg"
_STATES, _SAMPLES, _BOARD = "checkpoints", "samples", "tensorboard"
_ARE_SAMPLES = Kind(
    "samples", lambda folder: all(map(VIDEO.recognises, folder.glob("step_*/*"))), folder=True
)
_log = logging.getLogger(__name__)


def run_outputs(folder: Path) -> list[Output]:
    """What a `Trainer` writes to the folder of its run."""
    return [
        Output(folder / METRICS, METRICS_FILE),
        Output(folder / PLOT, SVG),
        Output(folder / _STATES, STATES),
        Output(folder / _SAMPLES, _ARE_SAMPLES),
        Output(folder / _BOARD, EVENTS),
    ]


def newest_state(folder: Path, resume: bool, about: Mapping[str, Any] | None = None) -> Path | None:
    """The training state that a run in a folder goes on from; None where it begins.

    Args:
        folder: the run's.
        resume: whether a run that is there is to go on.
        about: what the run's training states say of it, which has its ``recipe``; None to leave
            that unchecked.

    Raises:
        ValueError: there is one, and it should not be resumed, or is of another recipe.
    """
    found = training_states(folder / _STATES)
    if not found:
        return None
    if not resume:
        raise ValueError(f"{folder}: holds a run; resume it, or name another folder")
    if about is not None:
        check_recipe(found[-1], json.loads(json.dumps(about.get("recipe", {}))))
    return found[-1]


class Diverged(ArithmeticError):
    """The loss or a gradient is not finite. The weights are those before that update."""


class Trainer:
    """Trains an objective's module. Iterating takes one step at a time and gives its `Metrics`.

    The run's folder gets ``checkpoints/``, ``metrics.jsonl``, ``loss.svg`` and ``samples/``. A
    training state is written every ``checkpoint_every`` steps and after the last step.

    Validation and samples use the averaged weights, once there are some. The random numbers that
    they draw do not change the run.

    Args:
        objective: what a step minimises.
        dataset: the samples.
        section: the number of steps, the batch, the learning rate and so on.
        folder: the run's folder. With ``resume`` it may hold a run to go on with.
        about: plain data for the training states: the resolved ``recipe``, the pass ``log`` and the
            ``versions``.
        sample: writes samples of the module to the folder that it is given, on the first rank;
            the others have none.
        resume: go on from the newest training state in the folder, if there is one.
        note: told how far a validation is.
        mesh: the ranks that train together. The first writes the files, which are the same for any
            mesh: a run may go on with another one.

    Raises:
        ValueError: the folder holds a run and ``resume`` is false; the run had another recipe; the
            batch is not a whole number of calls; or the section wants samples and ``sample`` is
            None.
    """

    def __init__(
        self,
        objective: Objective,
        dataset: Dataset,
        section: TrainSection,
        folder: Path,
        about: Mapping[str, Any],
        sample: Callable[[Path | None], None] | None = None,
        resume: bool = False,
        note: Note = silent,
        mesh: Mesh = ALONE,
    ) -> None:
        if section.sample_every is not None and sample is None:
            raise ValueError("train.sample_every: nothing here can make samples; remove it")
        self._objective = objective
        self._dataset = dataset
        self._section = section
        self._folder = folder
        self._about = json.loads(json.dumps(about))
        self._sample = sample
        self._note = note
        self._mesh = mesh
        self._device = next(objective.module.parameters()).device
        self._watch = Stopwatch(self._device)
        shared: Divided = {}
        self._updates = Updates(objective, dataset, section, mesh, self._watch, shared)
        critic = objective.critic
        self._critic = None
        if critic is not None:
            self._critic = Updates(
                critic.objective, dataset, critic.section, mesh, self._watch, shared, "critic"
            )
            for module in critic.frozen if mesh.shards > 1 else ():
                divided(module, mesh, wide=False, found=shared)
        self._memory_is_new = True
        self._writer = StateWriter(self._states, section.keep, mesh)
        found = newest_state(folder, resume, about)
        if not mesh.same(found):
            raise ValueError(f"{folder}: ranks see other training states there; share the folder")
        torch.manual_seed(section.seed)
        if found is not None:
            self._resume(found)
        if mesh.rank == 0:
            for each in (folder, self._states):
                remove_unfinished(each)  # its lock says that nothing is writing there
            forget_after(folder / METRICS, self.step)
        shows = section.tensorboard and mesh.rank == 0
        self._board = Board(folder / _BOARD, self.step) if shows else None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that train as they are now, float32 by parameter name.

        All ranks must read it.
        """
        return _whole(self._updates.masters.copy())

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self._updates.done

    def __iter__(self) -> Iterator[Metrics]:
        return self

    def __next__(self) -> Metrics:
        """Take a step.

        Raises:
            StopIteration: the last step is done.
            Diverged: the loss or a gradient is not finite; names where that began.
            OSError: a file of the run cannot be written.
        """
        section = self._section
        if self.step >= section.steps:
            raise StopIteration
        self.settle(wait=False)
        start = time.perf_counter()
        rate = section.rate(self.step)
        if self.step == 0:
            self._lead()
        loss, norm = self._take(self._updates, rate, "train.lr", f"step {self.step + 1}")
        memory = self._objective.memory
        if memory is not None:
            memory.end_step(self._mesh)
        losses = self._follow()
        parts = self._watch.read()
        seconds = time.perf_counter() - start
        held = self._held() if self._memory_is_new else {}
        self._memory_is_new = False
        metrics = Metrics(
            self.step, loss, norm, rate, seconds, section.batch / seconds, self._look(), parts,
            *self._speed(seconds), held, losses,
        )  # fmt: skip
        if self._mesh.rank == 0:
            append_metrics(self._folder / METRICS, metrics)
        if self._board is not None:
            self._board.write(metrics)
        if _due(section.checkpoint_every, self.step) or self.step == section.steps:
            self.save(wait=self.step == section.steps)
        return metrics

    @property
    def ema(self) -> dict[str, Tensor]:
        """The averaged weights, float32 by name; empty before there are any.

        All ranks must read it.
        """
        return _whole(self._updates.averaged)

    def save(self, wait: bool = True) -> None:
        """Write a training state, and a plot of the loss so far. All ranks must call it.

        Args:
            wait: until it is written. If not, it is copied to main memory, and is written while the
                run goes on; see `settle`.

        Raises:
            OSError: it, or the one before, could not be written.
        """
        self.settle()
        if self._mesh.rank == 0 and (self._folder / METRICS).exists():
            sync(self._folder / METRICS)  # the state's history, whatever happens to the machine
        memory = self._objective.memory
        own, critic = self._updates, self._critic
        parts: Parts = {
            "weights": own.masters.parts(),
            "ema": own.averaged.items(),
            "optimiser": chain(own.optimiser.parts(), random_state().items()),
            "memory": () if memory is None else memory.state().items(),
            "critic_weights": () if critic is None else critic.masters.parts(),
            "critic_optimiser": () if critic is None else critic.optimiser.parts(),
        }
        self._writer.begin(self.step, own.position, self._about, parts)
        if wait:
            self.settle()

    def settle(self, wait: bool = True) -> None:
        """Let the training state that is being written, if there is one, take its place.

        That happens before each step too. All ranks must call it.

        Args:
            wait: until it is written.

        Raises:
            OSError: it could not be written.
        """
        path = self._writer.settle(wait)
        if path is None or self._mesh.rank > 0:
            return
        if history := read_metrics(self._folder / METRICS):
            write_text(self._folder / PLOT, plot_loss(history))
        _log.info("wrote %s", path)

    def left(self) -> str:
        """What there is to resume from, in words."""
        if found := training_states(self._states):
            return f"the last good training state is {found[-1]}; resume from it with --resume"
        return "there is no training state yet"

    @property
    def _states(self) -> Path:
        return self._folder / _STATES

    def _take(self, updates: Updates, rate: float, key: str, when: str) -> tuple[float, float]:
        """Take an update with a learning rate that has a key."""
        try:
            return updates.take(rate)
        except NotFinite as error:
            self.settle()
            raise Diverged(f"{when}: {error}; {self.left()}; lower {key} or train.clip") from error

    def _lead(self) -> None:
        """Update the critic, if there is one, before the first step."""
        critic = self._objective.critic
        if critic is None or not critic.lead:
            return
        losses = self._criticise(critic.lead, 0)
        some = max(1, critic.lead // 10)
        first, last = (sum(part) / some for part in (losses[:some], losses[-some:]))
        _log.info("the critic's loss fell from %.4g to %.4g before the first step", first, last)

    def _follow(self) -> dict[str, float]:
        """Update the critic, if there is one, as often as it is to be; its mean loss by name."""
        critic = self._objective.critic
        if critic is None:
            return {}
        losses = self._criticise(critic.updates, self.step - 1)
        return {"critic": sum(losses) / len(losses)}

    def _criticise(self, count: int, step: int) -> list[float]:
        """Update the critic with the learning rate of a step, counted from 0; the losses."""
        critic, updates = self._objective.critic, self._critic
        assert critic is not None and updates is not None
        rate = critic.section.rate(step)
        when = f"step {max(1, self.step)}, the critic"
        return [self._take(updates, rate, "distil.fake.lr", when)[0] for _ in range(count)]

    def _speed(self, seconds: float) -> tuple[float | None, float | None]:
        """Tokens a second and MFU of a step that took so long."""
        work = self._objective.work
        if work is None:
            return None, None
        calls = self._updates.calls * self._mesh.groups
        most = bfloat16_flops(self._device)
        share = None if most is None else calls * work.flops / (seconds * most * self._mesh.size)
        return calls * work.tokens / seconds, share

    def _held(self) -> dict[str, int]:
        """Bytes on this rank's device by owner, and the most that were allocated on a GPU.

        What is in main memory beside a GPU is not counted.
        """
        critic = self._objective.critic
        modules = [self._objective.module]
        trained = [self._updates]
        if critic is not None and self._critic is not None:
            modules += [critic.objective.module, *critic.frozen]
            trained.append(self._critic)
        running = {each for module in modules for each in module.parameters()}
        masters = [each for own in trained for each in own.masters.parameters.values()]
        owners: dict[str, Iterable[Tensor]] = {
            "weights": running,
            "float32 weights": [each for each in masters if each not in running],
            "gradients": masters,
            "AdamW moments": [each for own in trained for each in own.optimiser.held()],
            "average": self._updates.averaged.values(),
        }
        held = {owner: self._bytes(tensors) for owner, tensors in owners.items()}
        if self._device.type == "cuda":
            held["peak"] = torch.cuda.max_memory_allocated(self._device)
        return {owner: size for owner, size in held.items() if size}

    def _bytes(self, tensors: Iterable[Tensor]) -> int:
        """Of this rank's parts of those that are on its device."""
        own = (local_part(tensor) for tensor in tensors)
        return sum(each.nbytes for each in own if each.device.type == self._device.type)

    def _look(self) -> dict[str, float]:
        """Validate and write samples where they are due; give what validation found."""
        section, findings = self._section, {}
        if _due(section.validate_every, self.step):
            with self._evaluating():
                findings = {"loss": self._held_out_loss()}
        if self._sample is not None and _due(section.sample_every, self.step):
            folder = None
            if self._mesh.rank == 0:
                folder = self._folder / _SAMPLES / f"step_{self.step:08d}"
                folder.mkdir(parents=True, exist_ok=True)
            with self._evaluating():
                self._sample(folder)
        return findings

    def _held_out_loss(self) -> float:
        """The loss over samples of another seed, which is the same at every call."""
        clips = self._objective.clips
        batches = Batches(self._dataset, ~self._section.seed, clips)
        count = held_out(clips) // clips
        some = noted(islice(batches, count), "validating", count, self._note)
        loss = torch.tensor(mean_loss(self._objective, some), dtype=torch.float64)
        return float(self._mesh.total(loss)) / self._mesh.groups

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Let the module have the averaged weights for a while; restore torch's generators."""
        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices), torch.no_grad(), self._updates.using_averages():
            yield

    def _resume(self, path: Path) -> None:
        mesh, own, critic = self._mesh, self._updates, self._critic
        beside = {} if critic is None else critic.masters.parameters
        state = load_training_state(path, own.masters.parameters, mesh, beside)
        shapes = {} if critic is None else critic.shapes
        of_critic = self._objective.critic
        made = 0 if of_critic is None else of_critic.made(state.step)
        check_training_state(state, path, own.shapes, mesh, shapes, made)
        if state.position != state.step * self._section.batch:
            raise ValueError(
                f"{path}: after {state.step} steps of {self._section.batch} clips a run has not "
                f"seen {state.position}; remove it to resume from the one before"
            )
        if self._objective.memory:
            try:
                self._objective.memory.load(state.memory)
            except ValueError as error:
                raise ValueError(
                    f"{path}: {error}; remove it to resume from the one before"
                ) from error
        own.load(state, state.step)
        if critic is not None:
            critic.load(state.critic, made)
        restore_random_state(state.optimiser)
        _log.info("resumed from %s", path)


def _whole(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in values.items()}


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
