"""float32 weights behind a module that runs in less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Masters:
    """What trains, in float32; gradients are accumulated in float32 too.

    A parameter of a lower precision has a float32 copy, which the optimiser sees; a float32
    parameter is its own.

    Args:
        module: its parameters that require gradients train; from here on they share no memory with
            what they were made from.
        weights: what training starts from, by parameter name, in the precision of their file; left
            as they are.
        changed: called whenever the module runs with other weights.

    Raises:
        ValueError: nothing trains.
    """

    def __init__(
        self, module: nn.Module, weights: Mapping[str, Tensor], changed: Callable[[], None]
    ) -> None:
        self._changed = changed
        self._running = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self._running:
            raise ValueError("nothing trains: no parameter requires a gradient")
        self.parameters = {
            name: parameter
            if parameter.dtype == torch.float32
            else nn.Parameter(parameter.detach().float())
            for name, parameter in self._running.items()
        }
        """By name."""
        for name, master in self.parameters.items():
            master.data = weights[name].detach().to(master.device, torch.float32, copy=True)

    def collect(self) -> None:
        """Add the module's gradients to the float32 ones, and clear them."""
        for name, parameter in self._running.items():
            master = self.parameters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Let the module run with the weights as they are now."""
        for name, parameter in self._running.items():
            if self.parameters[name] is not parameter:
                parameter.copy_(self.parameters[name])
        self._changed()

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take other values, float32 by name, and publish them."""
        for name, master in self.parameters.items():
            master.copy_(values[name])
        self.publish()

    def copy(self) -> dict[str, Tensor]:
        """The weights as they are now, by name."""
        return {name: master.detach().clone() for name, master in self.parameters.items()}

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other weights for a while."""
        own = self.copy()
        self.load(values)
        try:
            yield
        finally:
            self.load(own)
