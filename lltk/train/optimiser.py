"""The optimiser of a training run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lltk.parallel.mesh import divided_like
from lltk.train.recipe import TrainSection


class Optimiser:
    """AdamW, with a state that goes by parameter names.

    Args:
        parameters: the weights that train, by name.
        section: has the betas and the weight decay.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], section: TrainSection) -> None:
        self._names = list(parameters)
        self._adamw = torch.optim.AdamW(
            parameters.values(),
            lr=section.lr,
            betas=section.betas,
            weight_decay=section.weight_decay,
        )

    def step(self, rate: float) -> None:
        """Update the weights by their gradients with this learning rate; clear the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """The moments and counters, under names such as ``exp_avg.proj_out.weight``."""
        return {
            f"{key}.{self._names[index]}": value
            for index, values in self._adamw.state_dict()["state"].items()
            for key, value in values.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; names that begin with ``rng.`` are left alone."""
        indices = {name: index for index, name in enumerate(self._names)}
        (group,) = self._adamw.param_groups
        states: dict[int, dict[str, Tensor]] = {}
        for full, value in tensors.items():
            key, _, name = full.partition(".")
            if key != "rng":
                index = indices[name]
                own = value if key == "step" else divided_like(value, group["params"][index])
                states.setdefault(index, {})[key] = own
        groups = self._adamw.state_dict()["param_groups"]
        self._adamw.load_state_dict({"state": states, "param_groups": groups})
