"""The sampler against recorded numbers, and against diffusers' UniPC on the same sigmas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from lltk.stream.sampler import Sampler, Schedule, guided

pytestmark = pytest.mark.cpu

Model = Callable[[Tensor, float], Tensor]

DIGITS = 1.5e-6
"""Recorded numbers have six decimals."""
CLOSE, FAR = 2e-6, 1e-4
"""Relative differences: the most that float32 may round, and the least of negative controls."""

RECORDED_SIGMAS = {
    2: (0.999800, 0.833055, 0),
    3: (0.999800, 0.908843, 0.713979, 0),
    4: (0.999800, 0.937265, 0.833055, 0.624687, 0),
}
RECORDED_TIMESTEPS = {2: (999, 833), 3: (999, 908, 713), 4: (999, 937, 833, 624)}
RECORDED_FORMS = {
    2: ((0.833222, 0.166778), (0, 0, 1)),
    3: ((0.909025, 0.090975), (0.714122, 0.011854, 0.274023), (0, 0, 0, 1)),
    4: (
        (0.937453, 0.062547),
        (0.833222, 0.017307, 0.149470),
        (0.624812, 0.020436, -0.067583, 0.422335),
        (0, 0, 0, 0, 1),
    ),
}
"""Coefficients of (noise, m_0, m_1, …) in each step's latents, of LongLive's own sampler."""


def run(schedule: Schedule, noise: Tensor, model: Model) -> Sampler:
    """A whole run; the model sees the latents and the timestep."""
    sampler = Sampler(schedule, noise)
    for i in range(schedule.steps):
        sampler.step(i, model(sampler.latents, float(sampler.timestep(i))))
    return sampler


def linear_model(seed: int = 0) -> Model:
    """A random velocity field. It is linear in the latents, and its matrix changes with time."""
    generator = torch.Generator().manual_seed(seed)
    still, moving = 0.5 * torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, 1, 1, 1, generator=generator, dtype=torch.float64)

    def velocity(latents: Tensor, timestep: float) -> Tensor:
        matrix = (still + timestep / 1000 * moving).to(latents.dtype)
        return torch.einsum("ij,bj...->bi...", matrix, latents) + bias.to(latents.dtype)

    return velocity


def make_noise() -> Tensor:
    return torch.randn(1, 6, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@pytest.mark.parametrize("steps", RECORDED_SIGMAS)
def test_recorded_sigmas_and_timesteps(steps: int) -> None:
    schedule = Schedule.make(steps)
    assert schedule.sigmas == pytest.approx(RECORDED_SIGMAS[steps], abs=DIGITS)
    assert schedule.timesteps == RECORDED_TIMESTEPS[steps]
    sampler = Sampler(schedule, torch.zeros(1))
    assert [int(sampler.timestep(i)) for i in range(steps)] == list(schedule.timesteps)


def linear_forms(schedule: Schedule) -> Tensor:
    """[N, N + 1]: the coefficients of (noise, m_0, …, m_(N-1)) in each step's latents."""
    basis = torch.eye(schedule.steps + 1)
    sampler = Sampler(schedule, basis[0])
    rows = []
    for i, sigma in enumerate(schedule.sigmas[:-1]):
        velocity = (sampler.latents.double() - basis[i + 1].double()) / sigma
        rows.append(sampler.step(i, velocity))
    return torch.stack(rows)


@pytest.mark.parametrize("steps", RECORDED_FORMS)
def test_recorded_linear_forms(steps: int) -> None:
    forms = linear_forms(Schedule.make(steps))
    for row, recorded in zip(forms.tolist(), RECORDED_FORMS[steps], strict=True):
        padded = [*recorded, *[0] * (steps + 1 - len(recorded))]
        assert row == pytest.approx(padded, abs=DIGITS)


def test_one_step_is_the_prediction() -> None:
    noise, velocity = torch.randn(2, 1, 6, 2, 4, 4)
    sampler = Sampler(Schedule.make(1), noise)
    assert torch.equal(sampler.step(0, velocity), sampler.result)
    assert difference(sampler.result, noise - 0.9998 * velocity) < 1e-6


def diffusers_run(
    steps: int, model: Model, *, shift: float = 1.0, own_sigmas: bool = False
) -> Tensor:
    """diffusers' sampler on the same noise.

    Args:
        steps: denoising passes.
        model: velocity from latents and timestep.
        shift: its own shift, on top of what it is fed.
        own_sigmas: whether it makes its own instead of being fed ours.
    """
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    ours = np.array(Schedule.make(steps).sigmas[:-1])
    scheduler.set_timesteps(steps, sigmas=None if own_sigmas else ours)
    scheduler.set_begin_index(0)
    latents = make_noise()
    for timestep in scheduler.timesteps:
        velocity = model(latents, float(timestep))
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [50, 4, 3, 2, 1])
def test_diffusers_on_our_sigmas(steps: int, seed: int) -> None:
    """Fed our sigmas it agrees. With its own, or if it shifts them again, it does not."""
    model = linear_model(seed)
    ours = run(Schedule.make(steps), make_noise(), model).result
    assert difference(ours, diffusers_run(steps, model)) < CLOSE
    stock = diffusers_run(steps, model, shift=5.0, own_sigmas=True)
    assert difference(ours, stock) > FAR
    assert difference(ours, diffusers_run(steps, model, shift=5.0)) > FAR


def test_state_is_float32_whatever_the_model_computes_in() -> None:
    schedule, model = Schedule.make(4), linear_model()

    def rough(latents: Tensor, timestep: float) -> Tensor:
        return model(latents.bfloat16(), timestep)

    sampler = run(schedule, make_noise().bfloat16(), rough)
    same = run(schedule, make_noise().bfloat16().float(), lambda x, t: rough(x, t).float())
    assert sampler.latents.dtype == sampler.result.dtype == torch.float32
    assert torch.equal(sampler.result, same.result)


def test_a_step_reads_nothing_back() -> None:
    """A meta tensor has no values: whatever asks for one raises."""
    schedule = Schedule.make(4, device="meta")
    noise = torch.empty(1, 6, 2, 4, 4, device="meta")
    sampler = Sampler(schedule, noise)
    for i in range(4):
        sampler.timestep(i).expand(1, 2)
        sampler.step(i, guided(sampler.latents, sampler.latents, 3.0))
    assert sampler.result.device.type == "meta"
    with pytest.raises(RuntimeError):
        sampler.result.sum().item()


def test_runs_share_nothing_but_the_schedule() -> None:
    """Interleaved runs give the bits of runs one after the other, and mutate nothing."""
    schedule, models = Schedule.make(4), (linear_model(0), linear_model(1))
    noise = make_noise()
    alone = [run(schedule, noise, model).result for model in models]
    pair = [Sampler(schedule, noise) for _ in models]
    seen = []
    for i in range(4):
        for sampler, model in zip(pair, models, strict=True):
            seen.append((sampler.latents, sampler.latents.clone()))
            sampler.step(i, model(sampler.latents, float(sampler.timestep(i))))
    for sampler, result in zip(pair, alone, strict=True):
        assert torch.equal(sampler.result, result)
    assert all(torch.equal(latents, before) for latents, before in seen)
    assert torch.equal(noise, make_noise())


def test_frames_do_not_touch_each_other() -> None:
    """Overwriting one frame of what the model sees leaves the others' bits."""
    noise, schedule, model = make_noise(), Schedule.make(4), linear_model()
    free, held = Sampler(schedule, noise), Sampler(schedule, noise)
    for i in range(4):
        timestep = float(free.timestep(i))
        latents = held.latents.clone()
        latents[:, :, 0] = 7.0
        free.step(i, model(free.latents, timestep))
        held.step(i, model(latents, timestep))
    assert torch.equal(held.result[:, :, 1], free.result[:, :, 1])
    assert not torch.equal(held.result[:, :, 0], free.result[:, :, 0])


@pytest.mark.parametrize("steps", RECORDED_FORMS)
def test_gradients_are_the_linear_forms(steps: int) -> None:
    """With outputs v_k, m_k = x_k - sigma_k v_k: the chain rule over the recorded forms."""
    schedule = Schedule.make(steps)
    inputs = torch.randn(steps + 1, 3, generator=torch.Generator().manual_seed(0))
    inputs.requires_grad_()
    sampler = Sampler(schedule, inputs[0])
    for i in range(steps):
        sampler.step(i, inputs[i + 1])
    (found,) = torch.autograd.grad(sampler.result.sum(), inputs)

    latents = torch.eye(steps + 1)[0]
    predictions = []
    for i, form in enumerate(RECORDED_FORMS[steps]):
        velocity = torch.eye(steps + 1)[i + 1]
        predictions.append(latents - schedule.sigmas[i] * velocity)
        terms = zip(form[1:], predictions, strict=True)
        latents = form[0] * torch.eye(steps + 1)[0] + sum(c * m for c, m in terms)
    assert found[:, 0].tolist() == pytest.approx(latents.tolist(), abs=5 * DIGITS)
    assert torch.equal(found, found[:, :1].expand_as(found))


@pytest.mark.parametrize("last", range(4))
def test_a_run_may_end_at_any_step(last: int) -> None:
    """Distillation ends there: no gradient flows before it, and its result is the prediction."""
    schedule, sampler = Schedule.make(4), Sampler(Schedule.make(4), make_noise())
    model = linear_model()
    with torch.no_grad():
        for i in range(last):
            sampler.step(i, model(sampler.latents, float(sampler.timestep(i))))
    latents = sampler.latents
    velocity = model(latents, float(sampler.timestep(last))).requires_grad_()
    sampler.step(last, velocity)
    sigma = schedule.sigmas[last]
    assert difference(sampler.result.detach(), (latents - sigma * velocity).detach()) < CLOSE
    (gradient,) = torch.autograd.grad(sampler.result.sum(), velocity)
    assert difference(gradient, torch.full_like(gradient, -sigma)) < CLOSE


def test_steps_are_taken_in_order() -> None:
    schedule, noise = Schedule.make(2), make_noise()
    sampler = Sampler(schedule, noise)
    with pytest.raises(ValueError, match="no result before the first step"):
        _ = sampler.result
    with pytest.raises(ValueError, match="step 1 of 2 out of order, expected 0"):
        sampler.step(1, noise)
    sampler.step(0, noise)
    with pytest.raises(ValueError, match="step 0 of 2 out of order, expected 1"):
        sampler.step(0, noise)
    sampler.step(1, noise)
    with pytest.raises(ValueError, match="step 2 of 2 out of order, all done"):
        sampler.step(2, noise)


@pytest.mark.parametrize(
    ("steps", "shift", "message"),
    [
        (0, 5.0, "steps=0: at least one"),
        (4, 0.0, "shift=0.0: must be positive"),
        (4, float("nan"), "shift=nan: must be positive"),
        (4, float("inf"), "shift=inf: must be positive"),
    ],
)
def test_misfit_schedules(steps: int, shift: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.make(steps, shift)


def test_guidance() -> None:
    c, u = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(guided(c, u, 3.0), torch.tensor([4.0, -5.0]))
    assert torch.equal(guided(c, u, 1.0), c)
    assert torch.equal(guided(c, u, 0.0), u)
    rough = guided(c.bfloat16(), u.bfloat16(), 1.01)
    assert torch.equal(rough, u + 1.01 * (c - u))
