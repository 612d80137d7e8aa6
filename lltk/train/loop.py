"""The training loop, one process."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lltk.graph.files import remove_unfinished, written_whole
from lltk.train.checkpoint import Checkpoint, checkpoints, load_checkpoint, save_checkpoint
from lltk.train.data import Batch, Batches, Dataset
from lltk.train.masters import Masters
from lltk.train.metrics import Metrics, append_metrics, forget_after, plot_loss, read_metrics
from lltk.train.objective import Objective
from lltk.train.recipe import MAY_CHANGE, TrainSection

METRICS = "metrics.jsonl"
PLOT = "loss.svg"
_log = logging.getLogger(__name__)


class Diverged(ArithmeticError):
    """The loss or a gradient is not finite; weights and checkpoints are those before the step."""


@dataclass(frozen=True)
class Hooks:
    """What a run calls now and then; in ``validate`` and ``sample`` the module has the averaged
    weights, once there are some, and random numbers drawn are not missed by the run.

    Attributes:
        observe: after every step.
        validate: every ``validate_every`` steps, with the steps done; its findings are recorded.
        sample: every ``sample_every`` steps, with the steps done and a folder to write to.
    """

    observe: Callable[[Metrics], None] | None = None
    validate: Callable[[int], Mapping[str, float]] | None = None
    sample: Callable[[int, Path], None] | None = None


class Trainer:
    """Trains an objective's module.

    The run's folder holds ``checkpoints/``, ``metrics.jsonl``, ``loss.svg`` and ``samples/``.

    Args:
        objective: what a step minimises.
        dataset: its samples.
        section: steps, batch, rates and the rest.
        folder: of the run; new, or with ``resume`` that of a run to go on with.
        about: plain data for the checkpoints: the resolved ``recipe``, the pass ``log``,
            ``versions``.
        hooks: what to call.
        resume: go on from the folder's newest checkpoint, if there is one.

    Raises:
        ValueError: the folder holds a run and ``resume`` is false, the run had another recipe, the
            batch is not a whole number of calls, or the section asks for a hook that is not there.
    """

    def __init__(
        self,
        objective: Objective,
        dataset: Dataset,
        section: TrainSection,
        folder: Path,
        about: Mapping[str, Any],
        hooks: Hooks | None = None,
        resume: bool = False,
    ) -> None:
        self._objective = objective
        self._section = section
        self._folder = folder
        self._about = json.loads(json.dumps(about))
        self._hooks = hooks or Hooks()
        _check_hooks(self._hooks, section)
        self._calls = section.calls(objective.clips)
        self._data = Batches(dataset, section.seed, objective.clips)
        self._masters = Masters(objective.module, objective.weights, objective.weights_changed)
        self._optimiser = torch.optim.AdamW(
            self._masters.parameters.values(),
            lr=section.lr,
            betas=section.betas,
            weight_decay=section.weight_decay,
        )
        self.step = 0
        """Steps done."""
        self.ema: dict[str, Tensor] = {}
        """Averaged weights, float32 by name; empty before there are any."""
        found = checkpoints(self._checkpoints)
        if found and not resume:
            raise ValueError(f"{folder}: holds a run; resume it, or name another folder")
        torch.manual_seed(section.seed)
        if found:
            self._resume(found[-1])
        for each in (folder, self._checkpoints):
            remove_unfinished(each)
        forget_after(folder / METRICS, self.step)

    @property
    def weights(self) -> dict[str, Tensor]:
        """What trains, float32 by parameter name."""
        return self._masters.copy()

    def run(self) -> None:
        """Train to the last step; the last checkpoint is of that step.

        Raises:
            Diverged: the loss or a gradient is not finite; names where it began.
        """
        section = self._section
        while self.step < section.steps:
            start = time.perf_counter()
            rate = section.rate(self.step)
            loss, norm = self._update(rate)
            self.step += 1
            self._average()
            seconds = time.perf_counter() - start
            validation = self._call_hooks()
            speed = section.batch / seconds
            metrics = Metrics(self.step, loss, norm, rate, seconds, speed, validation)
            append_metrics(self._folder / METRICS, metrics)
            if self.step % section.checkpoint_every == 0 or self.step == section.steps:
                self.save()
            if self._hooks.observe is not None:
                self._hooks.observe(metrics)

    def save(self) -> Path:
        """Write a checkpoint and the loss so far as a plot; returns the checkpoint's folder."""
        checkpoint = Checkpoint(
            self.step,
            self._data.position,
            self._about,
            self._masters.parameters,
            self.ema,
            self._optimiser_state() | _random_state(),
        )
        path = save_checkpoint(self._checkpoints, checkpoint, self._section.keep)
        if history := read_metrics(self._folder / METRICS):
            with written_whole(self._folder / PLOT) as temporary:
                temporary.write_text(plot_loss(history), encoding="utf-8")
        _log.info("step %d: wrote %s", self.step, path)
        return path

    def left(self) -> str:
        """What there is to resume from, in words."""
        if found := checkpoints(self._checkpoints):
            return f"the last good checkpoint is {found[-1]}; resume from it with --resume"
        return "there is no checkpoint yet"

    @property
    def _checkpoints(self) -> Path:
        return self._folder / "checkpoints"

    def _update(self, rate: float) -> tuple[float, float]:
        """One step; the loss and the gradient's norm before it."""
        batches = [next(self._data) for _ in range(self._calls)]
        count = max(1, sum(self._objective.count(batch) for batch in batches))
        parts = []
        for batch in batches:
            part = self._objective.loss(batch) / count
            part.backward()
            self._masters.collect()
            parts.append(part.detach())
        loss = float(torch.stack(parts).sum())
        masters = list(self._masters.parameters.values())
        norm = get_total_norm([m.grad for m in masters if m.grad is not None])
        if not math.isfinite(loss + float(norm)):
            raise Diverged(self._divergence(loss, float(norm), batches))
        clip_grads_with_norm_(masters, self._section.clip, norm)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._masters.publish()
        return loss, float(norm)

    def _divergence(self, loss: float, norm: float, batches: list[Batch]) -> str:
        where = next((bad for b in batches if (bad := self._objective.first_bad(b))), None)
        if where is None and math.isfinite(loss):
            gradients = {n: p.grad for n, p in self._masters.parameters.items()}
            names = [n for n, g in gradients.items() if g is not None and not g.isfinite().all()]
            where = f"the gradient of {names[-1] if names else 'all parameters together'}"
        return (
            f"step {self.step + 1}: the loss is {loss}, its gradient's norm {norm}; first not "
            f"finite: {where or 'the loss itself'}; {self.left()}; lower train.lr or train.clip"
        )

    @torch.no_grad()
    def _average(self) -> None:
        decay = self._section.ema_decay
        if decay is None or self.step < self._section.ema_start:
            return
        if not self.ema:
            self.ema = self._masters.copy()
            return
        for name, master in self._masters.parameters.items():
            self.ema[name].lerp_(master, 1 - decay)

    def _call_hooks(self) -> dict[str, float]:
        section, hooks, findings = self._section, self._hooks, {}
        if hooks.validate and _due(section.validate_every, self.step):
            with self._averaged():
                findings = dict(hooks.validate(self.step))
        if hooks.sample and _due(section.sample_every, self.step):
            folder = self._folder / "samples" / f"step_{self.step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            with self._averaged():
                hooks.sample(self.step, folder)
        return findings

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices), torch.no_grad():
            if not self.ema:
                yield
            else:
                with self._masters.replaced(self.ema):
                    yield

    def _resume(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        changed = _changed(checkpoint.about.get("recipe", {}), self._about.get("recipe", {}))
        if changed:
            raise ValueError(
                f"{path}: was made by another recipe: {', '.join(changed)} differ; resume with "
                "that recipe, or train in another folder"
            )
        self.step = checkpoint.step
        self._data.position = checkpoint.position
        self._masters.load(checkpoint.weights)
        devices = {name: master.device for name, master in self._masters.parameters.items()}
        self.ema = {name: tensor.to(devices[name]) for name, tensor in checkpoint.ema.items()}
        self._load_optimiser(checkpoint.optimiser)
        _restore_random_state(checkpoint.optimiser)
        _log.info("resumed from %s", path)

    def _optimiser_state(self) -> dict[str, Tensor]:
        states = self._optimiser.state_dict()["state"]
        names = list(self._masters.parameters)
        return {
            f"{key}.{names[index]}": value
            for index, state in states.items()
            for key, value in state.items()
        }

    def _load_optimiser(self, tensors: Mapping[str, Tensor]) -> None:
        indices = {name: index for index, name in enumerate(self._masters.parameters)}
        states: dict[int, dict[str, Tensor]] = {}
        for full, value in tensors.items():
            key, _, name = full.partition(".")
            if key != "rng":
                states.setdefault(indices[name], {})[key] = value
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": states, "param_groups": groups})


def _check_hooks(hooks: Hooks, section: TrainSection) -> None:
    for name in ("validate", "sample"):
        if getattr(section, f"{name}_every") is not None and getattr(hooks, name) is None:
            raise ValueError(f"train.{name}_every: this run has nothing to {name} with; remove it")


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys in which two recipes differ, but for those that a resumed run may change."""
    allowed = {f"train.{key}" for key in MAY_CHANGE}
    changed = []
    for key in sorted(old.keys() | new.keys()):
        path, ours, theirs = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            changed += _changed(ours, theirs, f"{path}.")
        elif ours != theirs and path not in allowed:
            changed.append(path)
    return changed


def _random_state() -> dict[str, Tensor]:
    """The state of torch's own generators (for dropout; clips and noise need none)."""
    states = {"rng.cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        states[f"rng.cuda.{index}"] = torch.cuda.get_rng_state(index)
    return states


def _restore_random_state(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
