"""Optimisers with small states, and weights that train without copies in float32."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import refused, same
from ranks import forked, free_port, grouped
from safetensors.torch import load_file, save_file
from torch import nn
from toy import Regression, trainer

from lltk.parallel.mesh import divided_like, meshed, whole
from lltk.parallel.ranks import Ranks
from lltk.train.masters import Masters
from lltk.train.optimiser import Optimiser
from lltk.train.recipe import TrainSection, train_section

cpu = pytest.mark.cpu
manual = pytest.mark.manual
SMALL = {"steps": 1, "lr": 1e-3, "optimiser": "adamw_8bit", "ema_decay": None}


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles its steps, which takes longer than these."""
    with torch.compiler.set_stance("force_eager"):
        yield


@cpu
def test_rounded_weights_need_stochastic_rounding() -> None:
    message = refused(train_section, {"steps": 1, "lr": 1.0, "weights": "compute"}, "my.yaml")
    assert "set train.optimiser=adamw_8bit, or train.weights=float32" in message


@cpu
@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_an_optimiser_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    message = refused(trainer, tmp_path, optimiser="adamw_8bit")
    assert message == (
        "train.optimiser: adamw_8bit is torchao's; install it by pip install torchao, or set adamw"
    )


@cpu
def test_weights_without_masters_are_the_modules_own() -> None:
    module = nn.Linear(3, 2).bfloat16()
    start = {name: torch.randn(p.shape) for name, p in module.named_parameters()}
    told: list[int] = []
    masters = Masters(module, start, lambda: told.append(1), own=False)
    assert all(masters.parameters[n] is p for n, p in module.named_parameters())
    assert torch.equal(module.weight, start["weight"].bfloat16())
    module(torch.ones(1, 3).bfloat16()).sum().backward()
    gradient = module.weight.grad
    masters.collect()
    assert module.weight.grad is gradient and gradient is not None
    copies = masters.copy()
    assert copies["weight"].dtype == torch.float32
    masters.load({name: 2 * value for name, value in copies.items()})
    assert torch.equal(module.weight.float(), 2 * copies["weight"])
    assert told == [1]


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_in_main_memory_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    """The module has copies of all weights then, of those in float32 too."""
    runs = []
    for offload in (False, True):
        objective = Regression(dtype=dtype)
        run = trainer(tmp_path / str(offload), objective, offload=offload, steps=12)
        runs.append([(step.loss, step.grad_norm) for step in run])
        own = set(objective.module.parameters())
        apart = [m not in own for m in run._updates.masters.parameters.values()]
        assert set(apart) == {offload or dtype == torch.bfloat16}
    assert runs[0] == runs[1] and runs[0][0] != runs[0][-1]


@pytest.mark.gpu
def test_masters_are_in_main_memory() -> None:
    module = nn.Linear(3, 2).cuda().bfloat16()
    start = {name: torch.randn(p.shape) for name, p in module.named_parameters()}
    masters = Masters(module, start, lambda: None, offload=True)
    module(torch.ones(1, 3, device="cuda").bfloat16()).sum().backward()
    masters.collect()
    for name, master in masters.parameters.items():
        assert master.device.type == "cpu" and master.dtype == torch.float32
        assert torch.equal(master, start[name])
        assert master.grad is not None and torch.equal(master.grad, torch.ones_like(master))
    masters.publish()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.cpu(), start[name].bfloat16())


@cpu
@pytest.mark.parametrize("change", [{"optimiser": "adamw_8bit"}, {"shards": 2}])
def test_what_does_not_go_with_main_memory_is_refused(change: dict[str, object]) -> None:
    section = {"steps": 1, "lr": 1.0, "offload": True} | change
    (key,) = change
    wanted = {"optimiser": "adamw", "shards": 1}[key]
    assert f"set train.{key}={wanted}, or" in refused(train_section, section, "my.yaml")


@manual
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_of_8_bits_is_read_as_it_was_written(dtype: torch.dtype) -> None:
    """It is written in float32, and quantising that again gives the same bits."""
    generator = torch.Generator().manual_seed(0)
    steps: list[list[torch.Tensor]] = []
    for resumed in (False, True):
        torch.manual_seed(1)
        generator.manual_seed(0)
        parameter = nn.Parameter(torch.randn(96, 128, generator=generator).to(dtype))
        section = TrainSection.model_validate(SMALL)
        optimiser = Optimiser({"w": parameter}, section)
        values = []
        for step in range(4):
            parameter.grad = torch.randn(96, 128, generator=generator).to(dtype)
            optimiser.step(1e-2)
            values.append(parameter.detach().clone())
            if resumed and step == 1:
                state = optimiser.state()
                assert all(value.dtype == torch.float32 for value in state.values())
                optimiser = Optimiser({"w": parameter}, section)
                optimiser.load(state)
        steps.append(values)
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
    assert not torch.equal(steps[0][2], steps[0][3])


@manual
@pytest.mark.usefixtures("eager")
def test_updates_below_the_last_bit_add_up() -> None:
    """bfloat16 has steps of 2⁻⁷ above 1. Rounded to the nearest, such an update would be lost."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.ones(64, 128).bfloat16())
    optimiser = Optimiser({"w": parameter}, TrainSection.model_validate(SMALL))
    for _ in range(20):
        parameter.grad = torch.full((64, 128), -1.0).bfloat16()
        optimiser.step(1e-4)
    assert float(parameter.detach().float().mean()) == pytest.approx(1 + 20e-4, abs=2e-4)
    assert (torch.ones(1).bfloat16() + 1e-4).bfloat16() == 1


def updated(size: int, resumes: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A weight and its moments after updates by random gradients, divided among ranks or not."""
    section = TrainSection.model_validate(SMALL | {"shards": size})
    generator = torch.Generator().manual_seed(0)
    rank = dist.get_rank() if size > 1 else 0
    torch.manual_seed(0)
    with meshed(Ranks(rank, size, torch.device("cpu")), 1, size) as mesh:
        module = nn.Linear(128, 96, bias=False).to(dtype)
        if size > 1:
            mesh.shard(module)
        weight = module.weight
        optimiser = Optimiser({"w": weight}, section)
        for step in range(4):
            torch.manual_seed(step)
            gradient = torch.randn(96, 128, generator=generator).to(dtype)
            weight.grad = divided_like(gradient, weight)
            optimiser.step(1e-2)
            if resumes and step == 1:
                state = {name: whole(value).clone() for name, value in optimiser.parts()}
                optimiser = Optimiser({"w": weight}, section)
                optimiser.load(state)
        found = {"w": weight.detach(), **optimiser.state()}
        return {name: whole(value).float() for name, value in found.items()}


def save_updated(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"), grouped(rank, 2, port):
        for resumes, dtype in product((False, True), (torch.float32, torch.bfloat16)):
            save_file(updated(2, resumes, dtype), folder / f"{resumes}, {dtype}, {rank}")


@manual
@pytest.mark.usefixtures("eager")
def test_moments_in_8_bits_are_divided(tmp_path: Path) -> None:
    """Each scale is of 256 values, so those of a rank's rows are those of the whole."""
    port = free_port()
    forked(save_updated, [(rank, port, tmp_path) for rank in range(2)])
    for rank, dtype in product(range(2), (torch.float32, torch.bfloat16)):
        first, again = (load_file(tmp_path / f"{r}, {dtype}, {rank}") for r in (False, True))
        assert same(first, again)
        if dtype == torch.float32:  # ranks round their own rows stochastically
            assert same(first, updated(1, False, dtype))
