"""Changes of a weight, and how they are added to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The change scale · B·A of a weight [out, in, …].

    Attributes:
        a: A, [rank, in, …].
        b: B, [out, rank], with further axes of size 1 where A has some.
        scale: what the product is multiplied by.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The rank of A and B."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the change."""
        return (self.b.shape[0], *self.a.shape[1:])

    def dense(self) -> Tensor:
        """The change, in float32."""
        product = self.b.flatten(1).float() @ self.a.flatten(1).float()
        return (self.scale * product).reshape(self.shape)


def add_changes(weight: Tensor, changes: Iterable[tuple[LowRank | Tensor, float]]) -> Tensor:
    """A weight with changes added: summed in float32, and rounded to the weight's dtype once.

    Args:
        weight: floating point.
        changes: of the weight's shape, each with its strength, which it is multiplied by.
    """
    total = weight
    for change, strength in changes:
        dense = change.dense() if isinstance(change, LowRank) else change.float()
        total = total + strength * dense
    return total.to(weight.dtype)
