"""The training loop."""

from __future__ import annotations

import json
import logging
import math
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
from lltk.parallel.mesh import ALONE, Mesh, divided_like, local_part, whole
from lltk.stream.timing import Stopwatch
from lltk.stream.video import VIDEO
from lltk.train.data import Batch, Batches, Dataset, held_out
from lltk.train.gradients import by_place, clip, total_norm
from lltk.train.masters import Masters
from lltk.train.metrics import (
    METRICS_FILE,
    Metrics,
    append_metrics,
    forget_after,
    plot_loss,
    read_metrics,
)
from lltk.train.objective import Objective, mean_loss
from lltk.train.optimiser import Optimiser
from lltk.train.plot import SVG
from lltk.train.progress import Note, noted, silent
from lltk.train.recipe import TrainSection, changed_keys
from lltk.train.saving import Parts, StateWriter
from lltk.train.shards import divided
from lltk.train.state import (
    STATES,
    check_training_state,
    load_training_state,
    random_state,
    restore_random_state,
    training_states,
)
from lltk.train.tensorboard import EVENTS, Board

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


def newest_state(folder: Path, resume: bool) -> Path | None:
    """The training state that a run in a folder goes on from; None where it begins.

    Raises:
        ValueError: there is one, and it should not be resumed.
    """
    found = training_states(folder / _STATES)
    if found and not resume:
        raise ValueError(f"{folder}: holds a run; resume it, or name another folder")
    return found[-1] if found else None


class Diverged(ArithmeticError):
    """The loss or a gradient is not finite. The weights are those before the step."""


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
        self._calls = section.calls(objective.clips * mesh.groups)
        self._data = Batches(dataset, section.seed, objective.clips, mesh.group, mesh.groups)
        wide = section.weights == "float32"
        apart = divided(objective.module, mesh, wide) if mesh.shards > 1 else {}
        self._masters = Masters(
            objective.module, objective.weights, objective.weights_changed, wide, apart
        )
        self._optimiser = Optimiser(self._masters.parameters, section)
        self._device = next(iter(self._masters.parameters.values())).device
        self._watch = Stopwatch(self._device)
        self._memory_is_new = True
        self.step = 0
        """How many steps are done."""
        self._ema: dict[str, Tensor] = {}
        self._writer = StateWriter(self._states, section.keep, mesh)
        found = newest_state(folder, resume)
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
        return _whole(self._masters.copy())

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
        loss, norm, losses = self._update(rate)
        self.step += 1
        with self._watch.measure("optimiser"):
            self._average()
        parts = self._watch.read()
        seconds = time.perf_counter() - start
        memory = self._held() if self._memory_is_new else {}
        self._memory_is_new = False
        metrics = Metrics(
            self.step, loss, norm, rate, seconds, section.batch / seconds, self._look(), parts,
            *self._speed(seconds), memory, losses,
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
        return _whole(self._ema)

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
        parts: Parts = {
            "weights": self._masters.parts(),
            "ema": self._ema.items(),
            "optimiser": chain(self._optimiser.parts(), random_state().items()),
            "memory": () if memory is None else memory.state().items(),
        }
        self._writer.begin(self.step, self._data.position, self._about, parts)
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

    def _update(self, rate: float) -> tuple[float, float, Mapping[str, float]]:
        """Update the weights once; give the loss, the gradient's norm before clipping, and further
        losses."""
        mesh, watch = self._mesh, self._watch
        with watch.measure("data"):
            batches = [next(self._data) for _ in range(self._calls)]
        counts = torch.tensor(sum(self._objective.count(batch) for batch in batches))
        count = max(1, int(mesh.total(counts)) // mesh.sequence)
        parts = []
        for batch in batches:
            with watch.measure("forward"):
                part = self._objective.loss(batch) / count
            with watch.measure("backward"):
                (part * mesh.factor).backward()
                self._masters.collect()
            parts.append(part.detach())
        groups = by_place(self._masters.parameters.values())
        with watch.measure("exchange"):
            loss = float(mesh.total(torch.stack(parts).sum()))
            mesh.add_up(master for group in groups for master in group)
            norm = total_norm(groups)
        if not math.isfinite(loss + float(norm)):
            self.settle()
            raise Diverged(self._divergence(loss, float(norm), batches))
        with watch.measure("optimiser"):
            clip(groups, self._section.clip, norm)
            self._optimiser.step(rate)
            self._masters.publish()
        memory = self._objective.memory
        return loss, float(norm), {} if memory is None else memory.end_step(mesh)

    def _speed(self, seconds: float) -> tuple[float | None, float | None]:
        """Tokens a second and MFU of a step that took so long."""
        work = self._objective.work
        if work is None:
            return None, None
        calls = self._calls * self._mesh.groups
        most = bfloat16_flops(self._device)
        share = None if most is None else calls * work.flops / (seconds * most * self._mesh.size)
        return calls * work.tokens / seconds, share

    def _held(self) -> dict[str, int]:
        """Bytes on this rank's device by owner, and the most that were allocated on a GPU."""
        parameters = list(self._objective.module.parameters())
        masters = list(self._masters.parameters.values())
        running = set(parameters)
        owners = {
            "weights": _bytes(parameters),
            "float32 weights": _bytes(each for each in masters if each not in running),
            "gradients": _bytes(masters),
            "AdamW moments": _bytes(self._optimiser.held()),
            "average": _bytes(self._ema.values()),
        }
        if self._device.type == "cuda":
            owners["peak"] = torch.cuda.max_memory_allocated(self._device)
        return {owner: size for owner, size in owners.items() if size}

    def _divergence(self, loss: float, norm: float, batches: list[Batch]) -> str:
        where: str | None = None
        if self._mesh.size == 1:  # ranks that share a clip would have to look together
            where = next((bad for b in batches if (bad := self._objective.first_bad(b))), None)
        if where is None and math.isfinite(loss):
            wrong = [
                name
                for name, master in self._masters.parameters.items()
                if master.grad is not None and not _finite(master.grad)
            ]
            where = f"the gradient of {wrong[-1] if wrong else 'all parameters together'}"
        return (
            f"step {self.step + 1}: the loss is {loss}, its gradient's norm {norm}; first not "
            f"finite: {where or 'the loss itself'}; {self.left()}; lower train.lr or train.clip"
        )

    @torch.no_grad()
    def _average(self) -> None:
        decay = self._section.ema_decay
        if decay is None or self.step < self._section.ema_start:
            return
        if not self._ema:
            self._ema = self._masters.copy()
            return
        for name, master in self._masters.parameters.items():
            self._ema[name].lerp_(master, 1 - decay)

    def _look(self) -> dict[str, float]:
        """Validate and write samples where they are due; give what validation found."""
        section, findings = self._section, {}
        if _due(section.validate_every, self.step):
            with self._averaged():
                findings = {"loss": self._held_out_loss()}
        if self._sample is not None and _due(section.sample_every, self.step):
            folder = None
            if self._mesh.rank == 0:
                folder = self._folder / _SAMPLES / f"step_{self.step:08d}"
                folder.mkdir(parents=True, exist_ok=True)
            with self._averaged():
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
    def _averaged(self) -> Iterator[None]:
        """Let the module have the averaged weights for a while; restore torch's generators."""
        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices), torch.no_grad():
            if not self._ema:
                yield
            else:
                with self._masters.replaced(self._ema):
                    yield

    def _resume(self, path: Path) -> None:
        masters, mesh = self._masters.parameters, self._mesh
        state = load_training_state(path, masters, mesh)
        check_training_state(state, path, {n: tuple(m.shape) for n, m in masters.items()}, mesh)
        changed = changed_keys(state.about.get("recipe", {}), self._about.get("recipe", {}))
        if changed:
            raise ValueError(
                f"{path}: was made by another recipe: {', '.join(changed)} differ; resume with "
                "that recipe, or train in another folder"
            )
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
        self.step = state.step
        self._data.position = state.position
        weights = {n: divided_like(state.weights[n], master) for n, master in masters.items()}
        self._masters.load(weights)
        self._ema = {n: divided_like(tensor, masters[n]) for n, tensor in state.ema.items()}
        self._optimiser.load(state.optimiser)
        restore_random_state(state.optimiser)
        _log.info("resumed from %s", path)


def _whole(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in values.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local_part(tensor).nbytes for tensor in tensors)


def _finite(value: Tensor) -> bool:
    return bool(whole(value).isfinite().all())


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
