"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lltk.train.data import Batch


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
