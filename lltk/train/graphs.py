"""Forward and backward passes replayed as CUDA graphs: a small model's kernels are short."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Graphed(nn.Module):
    """A module whose calls are replayed once they have been captured, at its first call.

    Shapes, dtypes and devices of the inputs are those of the first call, and inputs have no
    gradients. The gradients of a call are overwritten by the next, so they must be used in between.

    Args:
        module: on a GPU, without random numbers; its parameters may change in place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._replay: Callable[..., Tensor] | None = None

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """The module's result, one tensor, from its inputs by name."""
        if self._replay is None:
            # torch replaces the forward of what it is given, and flattens dicts into tensors.
            own: Any = copy.copy(self._module)
            sample: Any = (inputs,)
            with torch.enable_grad():
                self._replay = torch.cuda.make_graphed_callables(own, sample)
        return self._replay(inputs)
