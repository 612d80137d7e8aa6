"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lltk.parallel.mesh import Mesh
from lltk.train.data import Batch
from lltk.train.recipe import TrainSection


class Memory(Protocol):
    """What an objective keeps from step to step besides weights. It is the same on all ranks."""

    def end_step(self, mesh: Mesh) -> None:
        """Called after each step, on all ranks."""

    def state(self) -> Mapping[str, Tensor]:
        """All of it, by name. No later step changes these tensors."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: it is none that this objective can have.
        """


@dataclass(frozen=True)
class Work:
    """What a call is, over all ranks that share its clips.

    Attributes:
        tokens: the video tokens of its clips.
        flops: the floating-point operations of its forward and its backward pass.
    """

    tokens: int
    flops: int


@dataclass(frozen=True)
class Critic:
    """A network that learns beside an objective's own, with which it shares its clips' prompts.

    Attributes:
        objective: what its updates minimise.
        section: as the run's, with the critic's own learning rate, and without averaging.
        updates: how many follow each update of the objective's network.
        lead: how many precede the first of these.
        frozen: further modules that both ask and that do not train.
    """

    objective: Objective
    section: TrainSection
    updates: int
    lead: int = 0
    frozen: Sequence[nn.Module] = ()

    def made(self, step: int) -> int:
        """How many updates were made when a run has taken so many steps."""
        return self.lead + step * self.updates if step else 0


class Objective(Protocol):
    """What a step minimises: the sum of `loss` over its batches, divided by the sum of `count`."""

    @property
    def module(self) -> nn.Module:
        """The module that trains; its parameters that require gradients do."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The values that training starts from, by parameter name, in their file's precision."""

    @property
    def clips(self) -> int:
        """How many clips a call takes."""

    @property
    def memory(self) -> Memory | None:
        """What is kept from step to step; None if nothing is."""

    @property
    def critic(self) -> Critic | None:
        """What learns beside it; None if nothing does."""

    @property
    def work(self) -> Work | None:
        """What a call is; None where that is not counted."""

    def count(self, batch: Batch) -> int:
        """How much the batch counts in the step's mean: for example its frames, without padding."""

    def loss(self, batch: Batch) -> Tensor:
        """The batch's loss summed over what `count` counts, a float32 scalar."""

    def weights_changed(self) -> None:
        """Called when the module has got other weights, to renew what follows from them."""

    def first_bad(self, batch: Batch) -> str | None:
        """The input, parameter or node where the forward pass first is not finite, or None."""


@torch.no_grad()
def mean_loss(objective: Objective, batches: Iterable[Batch]) -> float:
    """The loss of a step that took all these batches."""
    parts = [(float(objective.loss(batch)), objective.count(batch)) for batch in batches]
    return sum(loss for loss, _ in parts) / max(1, sum(count for _, count in parts))
