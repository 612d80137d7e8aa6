"""Samples through the graph that trains are a stream's, or the reference's."""

from __future__ import annotations

import pytest
import torch
from helpers import make_program, make_recipe, runnable
from torch import Tensor, nn

from lltk.compiler import with_weights
from lltk.graph.module import ProgramModule, instantiate
from lltk.stream.positions import frame_positions
from lltk.stream.rollout import Rollout
from lltk.stream.sampler import Sampler, Schedule
from lltk.train.sampling import sample

pytestmark = pytest.mark.cpu
STEPS, SEED = 3, 5
ROUNDED = 0.01
"""Models are told of whole timesteps, which are the noise levels to a thousandth."""


def test_a_train_programs_samples_are_a_streams() -> None:
    train, module = runnable(make_recipe("train", window=12))
    stream, _ = runnable(make_recipe("stream", window=12))
    stream = with_weights(stream, train.weights)
    geometry = train.geometry
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, geometry.chunks, 5, 16, generator=generator)
    found = sample(train, module, text, STEPS, SEED)

    shape = (1, train.spec.channels, geometry.frames, *geometry.latent(train.spec))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    schedule = Schedule.make(STEPS)
    rollouts = [Rollout(stream, instantiate(stream)) for _ in range(2)]
    made: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for chunk, own in enumerate(noise.split(geometry.chunk, dim=2)):
            positions = frame_positions([0], geometry.chunk, first=chunk)
            for which, rollout in enumerate(rollouts):
                rollout.set_text(text[:, chunk])
                sampler = Sampler(schedule, own)
                for index in range(STEPS):
                    level = sampler.timestep(index).expand(1, geometry.chunk)
                    sampler.step(index, rollout.step(sampler.latents, level, positions))
                made[which].append(sampler.result)
            rollouts[0].commit(made[0][-1], positions)
    remembering, forgetful = (torch.cat(parts, dim=2) for parts in made)
    scale = remembering.abs().max()
    assert (found - remembering).abs().max() < 1e-4 * scale
    assert (found - forgetful).abs().max() > 1e-2 * scale


class Perfect(ProgramModule):
    """Stands in for a module that knows where every sample leads: to ``clean``."""

    def __init__(self, clean: Tensor) -> None:
        nn.Module.__init__(self)
        self.clean = clean
        self.given: list[dict[str, Tensor]] = []

    def forward(self, graph: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        assert graph == "reference"
        self.given.append(given)
        level = given["timestep"][:, None, :, None, None] / 1000
        return {"sample": (given["hidden_states"] - self.clean) / level}

    def quantised_weights(self) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_reference_goes_where_a_perfect_model_leads(steps: int) -> None:
    program = make_program(make_recipe("reference", batch=2), seed=None)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(2, 4, 6, 4, 4, generator=generator)
    text = torch.randn(2, 3, 5, 16, generator=generator)
    module = Perfect(clean)
    made = sample(program, module, text, steps, seed=1)
    assert torch.allclose(made, clean, atol=ROUNDED)
    assert len(module.given) == steps
    for given in module.given:
        assert torch.equal(given["encoder_hidden_states"], text)
        assert torch.equal(given["positions"], torch.arange(6, dtype=torch.float64))
        assert len(given["timestep"].unique()) == 1
    other = sample(program, module, text, steps, seed=2)
    assert torch.allclose(other, clean, atol=ROUNDED)
    firsts = [module.given[i]["hidden_states"] for i in (0, steps)]
    assert not torch.equal(*firsts)
    assert abs(float(firsts[0].std()) - 1) < 0.1
