"""A model of the 5B's width learns, and goes on where it was killed; on one GPU and on two."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import grouped
from test_gpu_training import run_ranks
from torch import Tensor

from lltk.bench.layouts import with_layout
from lltk.bench.random_weights import with_random_weights
from lltk.compiler import transform
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import parse_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.models.configs import named_config
from lltk.parallel.mesh import ALONE, Mesh, meshed
from lltk.parallel.ranks import Ranks
from lltk.train.data import Batch
from lltk.train.flow_matching import FlowMatching
from lltk.train.loop import Trainer
from lltk.train.recipe import TrainSection
from lltk.train.state import load_training_state, training_states

pytestmark = pytest.mark.gpu

LAYERS, FRAMES, STEPS, SAVED = 2, 32, 20, 12
FACTOR = 0.8
"""The loss of the last step is below so much of the first one's."""

BOUND = 0.01
"""How near in bfloat16 the losses and gradients of two GPUs are to one's, relatively."""


class OneSample:
    """The same random latents and text at every step."""

    def __init__(self, program: Program) -> None:
        geometry, spec = program.geometry, program.spec
        generator = torch.Generator("cuda").manual_seed(0)
        size = (1, spec.channels, geometry.frames, *geometry.latent(spec))
        text = (1, geometry.chunks, geometry.text_tokens, spec.text_dim)
        self._tensors = {
            "latents": torch.randn(size, generator=generator, device="cuda"),
            "text": torch.randn(text, generator=generator, device="cuda"),
        }

    def batch(self, seed: int, indices: range) -> Mapping[str, Tensor]:
        return self._tensors


class SameNoise(FlowMatching):
    """The objective of a sample whose noise and noise levels are those of the first step."""

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(replace(batch, indices=range(1)))


def made(
    ranks: int = 1, recipe: str = "wan22_5b_train_16s", layers: int = LAYERS, frames: int = FRAMES
) -> Program:
    data: dict[str, Any] = dict(read_recipe(find_recipe(recipe), [f"geometry.frames={frames}"]))
    config = dict(named_config("wan22_5b")) | {"num_layers": layers}
    data["model"] = dict(data["model"]) | {"checkpoint": None, "config": config}
    layout = None if ranks == 1 else "balanced_sp"
    data["passes"] = with_layout(data["passes"], layout, ranks)
    return with_random_weights(transform(parse_recipe(data, "large"), weights=False), "cuda")


def trainer(program: Program, folder: Path, resume: bool = False, mesh: Mesh = ALONE) -> Trainer:
    module = instantiate(program, "cuda")
    module.recompute_blocks(keep_attention=LAYERS)
    module.compile_blocks()
    settings = {"steps": STEPS, "lr": 3e-5, "ema_decay": None, "checkpoint_every": SAVED}
    settings |= {"shards": mesh.shards}
    section = TrainSection.model_validate(settings)
    objective = SameNoise(program, module)
    return Trainer(objective, OneSample(program), section, folder, {}, resume=resume, mesh=mesh)


def test_a_large_model_learns_and_goes_on(tmp_path: Path) -> None:
    program, states = made(), tmp_path / "checkpoints"
    run = trainer(program, tmp_path)
    losses = [next(run).loss for _ in range(SAVED + 2)]
    run.settle()
    del run  # as if it were killed
    torch.cuda.empty_cache()
    state = load_training_state(training_states(states)[-1])
    assert state.step == SAVED
    resumed = trainer(program, tmp_path, resume=True)
    assert resumed.step == SAVED
    for name, weight in resumed.weights.items():
        assert torch.equal(weight.cpu(), state.weights[name]), name
    for name, value in resumed._updates.optimiser.parts():
        assert torch.equal(value.cpu(), state.optimiser[name]), name
    again = [metrics.loss for metrics in resumed]
    assert again[0] == pytest.approx(losses[SAVED], rel=1e-3)
    assert again[-1] < FACTOR * losses[0]


def test_the_whole_5b_learns_in_nvfp4(tmp_path: Path) -> None:
    """Its products are emulated where the device has none of 4 bits."""
    program = made(recipe="wan22_5b_train_nvfp4", layers=30, frames=8)
    module = instantiate(program, "cuda")
    module.recompute_blocks()
    section = TrainSection.model_validate({"steps": 100, "lr": 3e-5, "ema_decay": None})
    run = Trainer(SameNoise(program, module), OneSample(program), section, tmp_path, {})
    steps = [next(run) for _ in range(4)]
    assert all(math.isfinite(step.loss + step.grad_norm) for step in steps)
    assert steps[-1].loss < steps[0].loss


def save_losses(rank: int, size: int, port: int, folder: Path) -> None:
    """Train on two GPUs until the step after a saved one; for a process of its own."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    ranks = Ranks(rank, size, device)
    with grouped(rank, size, port, "cpu:gloo,cuda:nccl"), meshed(ranks, size, size) as mesh:
        run = trainer(made(size), folder, mesh=mesh)
        steps = [next(run) for _ in range(SAVED + 1)]
        run.settle()
    if rank == 0:
        found = [[step.loss, step.grad_norm] for step in steps]
        (folder / "losses.json").write_text(json.dumps(found))


def test_two_gpus_train_what_one_does_and_one_goes_on(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    run_ranks(save_losses, folder=two)
    found = json.loads((two / "losses.json").read_text())
    program = made()
    alone = trainer(program, one)
    for loss, norm in found[:10]:
        step = next(alone)
        assert loss == pytest.approx(step.loss, rel=BOUND)
        assert norm == pytest.approx(step.grad_norm, rel=BOUND)
    del alone
    torch.cuda.empty_cache()
    resumed = trainer(program, two, resume=True)
    assert resumed.step == SAVED
    assert next(resumed).loss == pytest.approx(found[SAVED][0], rel=1e-3)
