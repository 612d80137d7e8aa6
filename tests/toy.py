"""A toy regression: an objective, samples and a trainer, for the tests of the loop."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lltk.files.writing import NewFile
from lltk.graph.diagnose import first_bad_module
from lltk.train import pieces
from lltk.train.data import Batch, generator_at
from lltk.train.loop import Trainer
from lltk.train.metrics import Metrics
from lltk.train.recipe import TrainSection

torch.set_num_threads(1)

SETTINGS: Mapping[str, Any] = {
    "steps": 60,
    "batch": 8,
    "lr": 0.01,
    "schedule": "cosine",
    "warmup": 5,
    "clip": 1.0,
    "ema_decay": 0.9,
    "ema_start": 10,
    "seed": 3,
    "checkpoint_every": 1,
}


class Regression:
    """Fits a noisy linear map; samples weigh 0 to 3. Dropout draws from torch's own generator.

    Args:
        clips: samples of a call.
        dropout: of the inputs.
        dtype: of the parameters, as they run.
    """

    memory = None
    critic = None
    work = None

    def __init__(
        self, clips: int = 4, dropout: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.module = nn.Sequential(nn.Dropout(dropout), nn.Linear(6, 16), nn.Linear(16, 2))
        self.weights = {
            name: torch.randn(parameter.shape, generator=generator) * 0.3
            for name, parameter in self.module.named_parameters()
        }
        self.module.load_state_dict(self.weights)
        self.module.to(dtype)
        self.clips = clips

    def count(self, batch: Batch) -> int:
        return int(batch.tensors["weight"].sum())

    def loss(self, batch: Batch) -> Tensor:
        x, y, weight = (batch.tensors[name] for name in ("x", "y", "weight"))
        x = x + 0.01 * batch.normal("noise", 6)
        error = self.module(x.to(self.module[1].weight.dtype)).float() - y
        return (weight * error.square().mean(1)).sum()

    def weights_changed(self) -> None:
        pass

    def first_bad(self, batch: Batch) -> str | None:
        return first_bad_module(self.module, lambda: self.loss(batch))


class Samples:
    """x ~ N(0, 1) and what a fixed matrix makes of it."""

    matrix = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        x = torch.stack([torch.randn(6, generator=generator_at(seed, i)) for i in indices])
        weight = torch.tensor([i % 4 for i in indices])
        return {"x": x, "y": x @ self.matrix, "weight": weight}


def settings(**changes: Any) -> TrainSection:
    return TrainSection.model_validate(dict(SETTINGS) | changes)


def trainer(
    folder: Path,
    objective: Regression | None = None,
    *,
    sample: Callable[[Path], None] | None = None,
    resume: bool = False,
    **changes: Any,
) -> Trainer:
    section = settings(**changes)
    about = {"recipe": {"train": section.model_dump(mode="json")}, "log": [], "versions": {}}
    objective = objective or Regression()
    return Trainer(objective, Samples(), section, folder, about, sample, resume)


def finish(run: Iterable[Metrics]) -> None:
    """Take all the steps that are left."""
    deque(run, maxlen=0)


def train_until_killed(folder: Path, dies_writing: int | None = None) -> None:
    """Train with dropout in low precision, resuming.

    Args:
        folder: of the run.
        dies_writing: kill this very process while it writes its state of this number.
    """
    write_tensors, written = pieces.write_tensors, 0

    def write_half(
        file: NewFile, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        nonlocal written
        written += "rng.cpu" in tensors
        if written == dies_writing:
            file.write(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        write_tensors(file, tensors, metadata)

    pieces.write_tensors = write_half
    objective = Regression(clips=2, dropout=0.2, dtype=torch.bfloat16)
    run = trainer(folder, objective, resume=True)
    finish(run)
