"""Samples through the graph that trains are a stream's, or the reference's."""

from __future__ import annotations

import pytest
import torch
from helpers import make_recipe, randomise, runnable

from lltk.compiler import with_weights
from lltk.graph.module import instantiate
from lltk.stream.positions import frame_positions
from lltk.stream.rollout import Rollout
from lltk.stream.sampler import Sampler, Schedule
from lltk.train.sampling import sample

pytestmark = pytest.mark.cpu
STEPS, SEED = 3, 5


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


def test_a_reference_denoises_the_whole_clip() -> None:
    program, _ = runnable(make_recipe("reference"))
    program = with_weights(program, randomise(program.weights, seed=3))
    module, spec, geometry = instantiate(program), program.spec, program.geometry
    text = torch.randn(1, geometry.chunks, 5, 16, generator=torch.Generator().manual_seed(2))
    found = sample(program, module, text, 1, SEED)
    shape = (1, spec.channels, geometry.frames, *geometry.latent(spec))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    schedule = Schedule.make(1)
    with torch.no_grad():
        flow = module(
            "reference",
            hidden_states=noise,
            timestep=torch.full((1, geometry.frames), float(schedule.timesteps[0])),
            encoder_hidden_states=text,
            positions=torch.arange(geometry.frames, dtype=torch.float64),
        )["sample"]
    wanted = noise - schedule.sigmas[0] * flow
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, sample(program, module, text, 1, SEED + 1), atol=1e-2)
