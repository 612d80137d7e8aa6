"""float32 master weights of a module that may run in a lower precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lltk.parallel.mesh import divided_like, local_part
from lltk.parallel.transfer import download, upload


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


class Masters:
    """The weights that train, in float32, and their gradients, added up in float32.

    The optimiser updates the masters. A parameter of lower precision has a master of its own, and
    `publish` rounds it back into the module. A float32 parameter, or a wider one, is its own,
    unless masters are in main memory. So is every one if masters are not to be had.

    Args:
        module: its parameters that require gradients train. From here on they share no memory with
            the weights that the module was made from.
        weights: what training starts from, by parameter name, in the precision of their file. They
            are left as they are.
        changed: called whenever the module has got other weights.
        own: whether parameters of lower precision have masters. Without them their gradients are
            added up in their own precision.
        offload: whether all parameters have masters, which are in main memory.
        apart: masters of parameters that the module has only stand-ins for, by name. They get
            their gradients without the module's, and are not published to it.

    Raises:
        ValueError: no parameter of the module requires a gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor],
        changed: Callable[[], None],
        own: bool = True,
        offload: bool = False,
        apart: Mapping[str, nn.Parameter] = MappingProxyType({}),
    ) -> None:
        self._changed = changed
        self._running = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and name not in apart
        }
        if not self._running and not apart:
            raise ValueError("nothing trains: no parameter requires a gradient")
        place = torch.device("cpu") if offload else None
        self.parameters = {
            name: parameter
            if not (offload or (own and parameter.dtype != _wide(parameter)))
            else nn.Parameter(parameter.detach().to(place, _wide(parameter), copy=True))
            for name, parameter in self._running.items()
        } | dict(apart)
        """The masters, by parameter name."""
        for name, master in self.parameters.items():
            start = weights[name].detach().to(master.device, master.dtype, copy=True)
            master.data = divided_like(start, master)

    def collect(self) -> None:
        """Add the module's gradients to the masters', and clear the module's."""
        for name, parameter in self._running.items():
            master = self.parameters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad
            if gradient.device != master.device:
                gradient = download(gradient)
            gradient = gradient.to(master.dtype)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Give the module the masters' values."""
        given, values = [], []
        for name, parameter in self._running.items():
            master: Tensor = self.parameters[name]
            if master.device != parameter.device:
                parameter.copy_(upload(master.to(parameter.dtype), parameter.device))
            elif master is not parameter:
                given.append(local_part(parameter))
                values.append(local_part(master))
        if given:
            torch._foreach_copy_(given, values)
        self._changed()

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the masters to other values, float32 by name, and publish them."""
        for name, master in self.parameters.items():
            master.copy_(values[name])
        self.publish()

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """The masters' names and values, one by one, in float32 or wider.

        They change with the masters.
        """
        for name, master in self.parameters.items():
            yield name, master.detach().to(_wide(master))

    def copy(self) -> dict[str, Tensor]:
        """The masters' values as they are now, by name, in float32 or wider."""
        return {
            name: master.detach().to(_wide(master), copy=True)
            for name, master in self.parameters.items()
        }

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the module other weights inside the block; afterwards it has its own again."""
        own = self.copy()
        self.load(values)
        try:
            yield
        finally:
            self.load(own)
