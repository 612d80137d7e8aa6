"""The optimiser of a training run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lltk.parallel.mesh import divided_like, local_part, parted_like
from lltk.train.recipe import TrainSection


class Optimiser:
    """AdamW, with a state that goes by parameter names.

    Each value is updated by itself, so a rank updates its own part of a divided weight.

    Args:
        parameters: the weights that train, by name. Those in bfloat16 are rounded stochastically.
        section: names the optimiser, its betas and its weight decay.

    Raises:
        ValueError: the optimiser's package is not installed.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], section: TrainSection) -> None:
        self._parameters = dict(parameters)
        self._own = {n: nn.Parameter(local_part(p.detach())) for n, p in parameters.items()}
        self._adamw = _make(self._own.values(), section)

    def step(self, rate: float) -> None:
        """Update the weights by their gradients with this learning rate; clear the gradients."""
        for group in self._adamw.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            self._own[name].grad = None if gradient is None else local_part(gradient)
            parameter.grad = None
        self._adamw.step()
        self._adamw.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """The moments and counters in float32, under names such as ``exp_avg.proj_out.weight``."""
        return dict(self.parts())

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """What `state` has, one by one."""
        for name, parameter in self._parameters.items():
            for key, value in self._adamw.state[self._own[name]].items():
                own = _in_float32(value)
                yield f"{key}.{name}", own if key == "step" else parted_like(own, parameter)

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
            if key != "step":
                value = local_part(divided_like(value, self._parameters[name]))
            own = self._own[name]
            self._adamw.state[own][key] = self._as_held(key, value, own)

    def _as_held(self, key: str, value: Tensor, own: nn.Parameter) -> Tensor:
        """A part of the state as the optimiser has it. Quantising it again gives the same bits."""
        if key == "step" or isinstance(self._adamw, torch.optim.AdamW):
            return value.clone()
        adamw: Any = self._adamw
        held: Tensor = adamw._new_buffer(own, signed=key == "exp_avg")
        held.copy_(value)
        return held


def _make(parameters: Iterable[nn.Parameter], section: TrainSection) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"betas": section.betas, "weight_decay": section.weight_decay}
    if section.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=section.lr, **options)
    if find_spec("torchao") is None:
        raise ValueError(
            "train.optimiser: adamw_8bit is torchao's; install it by pip install torchao, or set "
            "adamw"
        )
    from torchao.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=section.lr, bf16_stochastic_round=True, **options
    )
    return made


def _in_float32(value: Tensor) -> Tensor:
    """A part of a state in float32 or wider, decoded if it has 8 bits."""
    has_codes: Any = value
    if hasattr(value, "codes"):
        decoded: Tensor = has_codes.dequantize(torch.float32)
        return decoded
    return value.to(torch.promote_types(value.dtype, torch.float32))
