"""Forward and backward passes replayed as CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lltk.graph.module import ProgramModule
from lltk.graph.program import Program


class OneOutput(nn.Module):
    """The one output of a Program that trains, from its inputs in their order.

    CUDA graphs take tensors only, so this is where a call's inputs get their names again.

    Args:
        module: runs the Program.
        program: of one graph, which its kind names.
    """

    def __init__(self, module: ProgramModule, program: Program) -> None:
        super().__init__()
        self._module = module
        self._kind = program.kind
        self._names = tuple(program.contract(program.kind).inputs)
        self._output = program.spec.output

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self._names, inputs, strict=True))
        return self._module(self._kind, named)[self._output]


class Graphed(nn.Module):
    """A module that is captured as CUDA graphs at its first call and replayed from then on.

    This helps small models, whose kernels take less time than their launches. Every call must have
    inputs of the first call's shapes, dtypes and devices. Inputs get no gradients. A call
    overwrites the result and the gradients of the call before, so use them in between.

    Args:
        module: lies on a GPU and draws no random numbers. Its parameters may change in place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._replay: Callable[..., Tensor] | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        """The module's result, one tensor."""
        if self._replay is None:
            # torch replaces the forward of the module that it is given.
            own = copy.copy(self._module)
            with torch.enable_grad():
                made = torch.cuda.make_graphed_callables(own, inputs)
            self._replay = cast(Callable[..., Tensor], made)
        return self._replay(*inputs)
