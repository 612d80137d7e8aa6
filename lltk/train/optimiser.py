"""The optimiser of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lltk.parallel.mesh import divided_like
from lltk.train.gradients import by_place
from lltk.train.recipe import TrainSection


class Optimiser:
    """AdamW, with a state that goes by parameter names.

    Args:
        parameters: the weights that train, by name. Those in bfloat16 are rounded stochastically.
        section: names the optimiser, its betas and its weight decay.

    Raises:
        ValueError: the optimiser's package is not installed.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], section: TrainSection) -> None:
        self._parameters = dict(parameters)
        self._adamw = _make(self._parameters, section)

    def step(self, rate: float) -> None:
        """Update the weights by their gradients with this learning rate; clear the gradients."""
        for group in self._adamw.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """The moments and counters in float32, under names such as ``exp_avg.proj_out.weight``."""
        return dict(self.parts())

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """What `state` has, one by one."""
        for name, parameter in self._parameters.items():
            for key, value in self._adamw.state[parameter].items():
                yield f"{key}.{name}", _in_float32(value)

    def held(self) -> Iterator[Tensor]:
        """The tensors that hold the state; an 8-bit one is its codes and its scales."""
        for state in self._adamw.state.values():
            for value in state.values():
                has_codes: Any = value
                yield from (
                    (has_codes.codes, has_codes.scale) if hasattr(value, "codes") else (value,)
                )

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; names that begin with ``rng.`` are left alone."""
        for full, value in tensors.items():
            key, _, name = full.partition(".")
            if key == "rng":
                continue
            parameter = self._parameters[name]
            self._adamw.state[parameter][key] = self._as_held(key, value, parameter)

    def _as_held(self, key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """A part of the state as the optimiser has it. Quantising it again gives the same bits."""
        if key == "step":
            return value.clone()
        own = divided_like(value, parameter)
        if isinstance(self._adamw, torch.optim.AdamW):
            return own.clone()
        adamw: Any = self._adamw
        held: Tensor = adamw._new_buffer(parameter, signed=key == "exp_avg")
        held.copy_(own)
        return held


def _make(parameters: Mapping[str, nn.Parameter], section: TrainSection) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"betas": section.betas, "weight_decay": section.weight_decay}
    groups = [{"params": group} for group in by_place(parameters.values())]
    if section.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=section.lr, **options)
    if find_spec("torchao") is None:
        raise ValueError(
            "train.optimiser: adamw_8bit is torchao's; install it by pip install torchao, or set "
            "adamw"
        )
    from torchao.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(
        groups, lr=section.lr, bf16_stochastic_round=True, **options
    )
    return made


def _in_float32(value: Tensor) -> Tensor:
    """A part of a state, decoded if it has 8 bits."""
    has_codes: Any = value
    return has_codes.dequantize(torch.float32) if hasattr(value, "codes") else value
