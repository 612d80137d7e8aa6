"""A model of the 5B's width learns, and goes on where it was killed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lltk.bench.random_weights import with_random_weights
from lltk.compiler import transform
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import parse_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.models.configs import named_config
from lltk.train.data import Batch
from lltk.train.flow_matching import FlowMatching
from lltk.train.loop import Trainer
from lltk.train.recipe import TrainSection
from lltk.train.state import load_training_state, training_states

pytestmark = pytest.mark.gpu

LAYERS, FRAMES, STEPS, SAVED = 2, 32, 20, 12
FACTOR = 0.8
"""The loss of the last step is below so much of the first one's."""


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


def made(layers: int) -> Program:
    changes = [f"geometry.frames={FRAMES}"]
    data: dict[str, Any] = dict(read_recipe(find_recipe("wan22_5b_train_16s"), changes))
    config = dict(named_config("wan22_5b")) | {"num_layers": layers}
    data["model"] = dict(data["model"]) | {"checkpoint": None, "config": config}
    return with_random_weights(transform(parse_recipe(data, "large"), weights=False), "cuda")


def trainer(program: Program, folder: Path, resume: bool = False) -> Trainer:
    module = instantiate(program, "cuda")
    module.recompute_blocks(keep_attention=LAYERS)
    module.compile_blocks()
    settings = {"steps": STEPS, "lr": 3e-5, "ema_decay": None, "checkpoint_every": SAVED}
    section = TrainSection.model_validate(settings)
    objective = SameNoise(program, module)
    return Trainer(objective, OneSample(program), section, folder, {}, resume=resume)


def test_a_large_model_learns_and_goes_on(tmp_path: Path) -> None:
    program, states = made(LAYERS), tmp_path / "checkpoints"
    run, losses = trainer(program, tmp_path), list[float]()
    while not training_states(states) or len(losses) == SAVED:  # it is written meanwhile
        losses.append(next(run).loss)
    del run  # as if it were killed
    torch.cuda.empty_cache()
    state = load_training_state(training_states(states)[-1])
    assert state.step == SAVED < len(losses) < STEPS
    resumed = trainer(program, tmp_path, resume=True)
    assert resumed.step == SAVED
    for name, weight in resumed.weights.items():
        assert torch.equal(weight.cpu(), state.weights[name]), name
    for name, value in resumed._optimiser.parts():
        assert torch.equal(value.cpu(), state.optimiser[name]), name
    again = [metrics.loss for metrics in resumed]
    assert again[0] == pytest.approx(losses[SAVED], rel=1e-3)
    assert again[-1] < FACTOR * losses[0]
