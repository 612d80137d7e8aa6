"""What ranks that distil together make, for the tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import captures
import torch
import torch.distributed as dist
from ranks import forked, free_port, grouped
from safetensors.torch import save_file
from test_distillation import Prompts, recipe
from torch import Tensor
from training_ranks import in_float64

from lltk.graph.module import instantiate
from lltk.parallel.mesh import local_part, whole
from lltk.parallel.ranks import Ranks
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.tasks import distillation
from lltk.tasks.distillation import DistillationPlan, plan_distillation
from lltk.train.objective import Objective
from lltk.train.optimiser import Optimiser
from lltk.train.share import Share
from lltk.training import open_training

CPU = torch.device("cpu")
CHUNKS, STEPS = 4, 2
SETTINGS = (
    f"geometry.frames={2 * CHUNKS}", "distil.steps=[2]", "distil.guidance=3.0",
    "train.image=0.5", "train.seed=5", "train.recompute=true", "train.clip=0.02",
    "distil.fake.updates=1", "distil.fake.lead=0",
)  # fmt: skip
"""Gradients are clipped, and both with first frames that are given and without."""
Run = tuple[int, int]
"""How many of two ranks share a clip, and how many the weights."""
RUNS: list[Run] = [(2, 1), (1, 2), (2, 2)]
FAULT = "own gradients"
_STREAM = ["canonicalise", "per_frame_timesteps", "frame_positions", "hoist_text", "cached_step",
           "commit", {"lora": {"rank": 4, "alpha": 4}}]  # fmt: skip


def planned(pipeline: Path, run: Run, *changes: str) -> DistillationPlan:
    sequence, shards = run
    plan = _planned(pipeline, sequence, *changes)
    return replace(plan, section=plan.section.model_copy(update={"shards": shards}))


@cache
def _planned(pipeline: Path, sequence: int, *changes: str) -> DistillationPlan:
    """A plan for ranks that share the weights in any way."""
    shared = {"ulysses_stream": {"size": sequence, "exchange": "compute"}}
    passes = [*_STREAM, *([shared] if sequence > 1 else []), "regionalise", "lower"]
    own = f"passes={json.dumps(passes)}"
    return plan_distillation(recipe(pipeline, *SETTINGS, own, *changes), CPU, "test")


def wide(plan: DistillationPlan) -> DistillationPlan:
    """The same with networks that run in float64."""
    made = {
        name: replace(getattr(plan, name), dtype=torch.float64)
        for name in ("program", "real", "fake")
    }
    return replace(plan, **made)


@contextmanager
def widened() -> Iterator[None]:
    """Let their weights, and all that their graphs read, be in float64 where it is no integer."""
    made = partial(instantiate, dtype=torch.float64)
    given = TorchRuntime._given

    def wider(self: TorchRuntime, graph: str, moving: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = self._contracts[graph].inputs
        return {n: value.to(inputs[n].dtype) for n, value in given(self, graph, moving).items()}

    with (
        in_float64(),
        patch.object(distillation, "instantiate", made),
        patch.object(TorchRuntime, "_given", wider),
    ):
        yield


@contextmanager
def noting(found: dict[str, Tensor]) -> Iterator[None]:
    """Keep the gradients of each update, as they are after clipping."""
    step, updates = Optimiser.step, 0

    def noted(self: Optimiser, rate: float) -> None:
        nonlocal updates
        for name, master in self._parameters.items():
            found[f"{updates}.{name}"] = whole(master.grad).clone()
        updates += 1
        step(self, rate)

    with patch.object(Optimiser, "step", noted):
        yield


def distilled(
    pipeline: Path, ranks: Ranks, run: Run = (1, 1), steps: int = STEPS
) -> dict[str, Tensor]:
    """Losses, norms and gradients of both networks' updates, and the student's weights after."""
    found: dict[str, Tensor] = {}
    plan = wide(planned(pipeline, run))
    with widened(), noting(found), TemporaryDirectory() as folder:
        prompts = Prompts(CHUNKS)
        with open_training(plan, Path(folder), dataset=prompts, ranks=ranks) as training:
            for number, metrics in zip(range(steps), training, strict=False):
                told = (metrics.loss, metrics.grad_norm, metrics.losses["critic"])
                found[f"{number}.told"] = torch.tensor(told, dtype=torch.float64)
            weights = training.trainer.weights
            found["once"] = torch.tensor(held_once(training.objective), dtype=torch.float64)
    return found | {f"weight.{name}": value for name, value in weights.items()}


def held_once(objective: Objective) -> int:
    """How many of the real score's weights are the very memory of the student's and the critic's.

    That is all of them.
    """
    assert objective.critic is not None
    student, fake, real = (
        {name: local_part(parameter) for name, parameter in module.named_parameters()}
        for module in (
            objective.module, objective.critic.objective.module, *objective.critic.frozen
        )
    )  # fmt: skip
    same = [
        name
        for name, own in real.items()
        if own.data_ptr() == student[name].data_ptr() == fake[name].data_ptr()
    ]
    assert len(same) == len(real)
    return len(same)


def goes_on(pipeline: Path, ranks: Ranks, folder: Path, steps: int, run: Run) -> list[Any]:
    """Each step's losses and norm, of a run from where it was left up to a step."""
    plan, prompts = planned(pipeline, run), Prompts(CHUNKS)
    section = plan.section.model_copy(update={"steps": steps, "checkpoint_every": 1})
    plan = replace(plan, section=section)
    with open_training(plan, folder, dataset=prompts, ranks=ranks, resume=True) as training:
        return [(m.loss, m.losses["critic"], m.grad_norm) for m in training]


@contextmanager
def own_gradients() -> Iterator[None]:
    """Let each rank keep what its share of a loss says of a clip that all have made."""

    def counted(self: Share, alike: Tensor, axis: int) -> Tensor:
        return alike.chunk(self.ranks, axis)[self._rank]

    with patch.object(Share, "counted", counted):
        yield


def file_of(run: Run | str, rank: int) -> str:
    return f"{run}, {rank}"


def save_distilled(rank: int, size: int, port: int, pipeline: Path, folder: Path) -> None:
    """Write what this rank makes of its runs; for a process of its own."""
    torch.set_num_threads(1)
    ranks = Ranks(rank, size, CPU)
    with grouped(rank, size, port):
        for run in RUNS:
            save_file(distilled(pipeline, ranks, run), folder / file_of(run, rank))
        with own_gradients():
            save_file(distilled(pipeline, ranks, (2, 1), 1), folder / file_of(FAULT, rank))
        whole = goes_on(pipeline, ranks, folder / "whole", 2, (2, 2))
        if rank == 0:
            shutil.rmtree(folder / "whole" / "checkpoints" / "step_00000002")
            for name in ("half", "other"):
                shutil.copytree(folder / "whole", folder / name)
        dist.barrier()
        rest = goes_on(pipeline, ranks, folder / "half", 2, (2, 2))
        (folder / file_of("losses", rank)).write_text(json.dumps({"whole": whole, "rest": rest}))


def save_all(pipeline: Path, folder: Path) -> None:
    """Run every case; for a new process, of which the ranks are forks."""
    torch.set_num_threads(1)
    with captures.shared():
        for run in RUNS:
            planned(pipeline, run)
    port = free_port()
    forked(save_distilled, [(rank, 2, port, pipeline, folder) for rank in range(2)])
