"""Forward and backward passes replayed as CUDA graphs: a small model's kernels are short."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

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

    def forward(self, *inputs: Tensor) -> Tensor:
        """The module's result, one tensor."""
        if self._replay is None:
            # torch replaces the forward of what it is given.
            own = copy.copy(self._module)
            with torch.enable_grad():
                made = torch.cuda.make_graphed_callables(own, inputs)
            self._replay = cast(Callable[..., Tensor], made)
        return self._replay(*inputs)
