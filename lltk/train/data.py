"""Numbered samples: everything random about sample i follows from a seed and i.

So a step's batch does not depend on how it is split into calls, nor on what ran before it, and a
resumed run sees what it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_BLOCK = 64
"""Kept samples made at once."""


class Dataset(Protocol):
    """Endlessly many samples, by number."""

    def batch(self, seed: int, indices: range) -> Mapping[str, Tensor]:
        """Samples, stacked along the first axis of each tensor.

        Sample i is the same whenever it is asked for and whatever is asked for with it; draw it
        with `generator_at`.
        """


def generator_at(
    seed: int, *counters: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator whose numbers depend on the arguments alone (on the kind of device too)."""
    digest = hashlib.sha256(repr((seed, *counters)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@dataclass(frozen=True)
class Batch:
    """Consecutive samples and their random numbers.

    Attributes:
        seed, indices: which samples.
        tensors: the samples by name, stacked.
    """

    seed: int
    indices: range
    tensors: Mapping[str, Tensor]

    def normal(self, purpose: str, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers, float32 [B, *shape], drawn on the device."""
        drawn = [
            torch.randn(shape, generator=generator, device=device)
            for generator in self._generators(purpose, device)
        ]
        return torch.stack(drawn)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Numbers uniform in [0, 1), float32 [B, *shape], on the CPU."""
        return torch.stack([torch.rand(shape, generator=g) for g in self._generators(purpose)])

    def integers(self, purpose: str, below: int, *shape: int) -> Tensor:
        """Whole numbers uniform in [0, below), int64 [B, *shape], on the CPU."""
        drawn = [torch.randint(below, shape, generator=g) for g in self._generators(purpose)]
        return torch.stack(drawn)

    def _generators(
        self, purpose: str, device: torch.device | str = "cpu"
    ) -> list[torch.Generator]:
        return [generator_at(self.seed, purpose, index, device=device) for index in self.indices]


class Kept:
    """A dataset's first samples, made once, and each drawn again and again; of one seed.

    Samples of other seeds, such as held-out ones, are the dataset's own.

    Args:
        dataset: makes the samples.
        seed: of those that are kept.
        count: how many are kept.
    """

    def __init__(self, dataset: Dataset, seed: int, count: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._count = count
        blocks = [range(i, min(i + _BLOCK, count)) for i in range(0, count, _BLOCK)]
        parts = [dataset.batch(seed, block) for block in blocks]
        self._kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def batch(self, seed: int, indices: range) -> Mapping[str, Tensor]:
        if seed != self._seed:
            return self._dataset.batch(seed, indices)
        chosen = [
            int(torch.randint(self._count, (), generator=generator_at(seed, "clip", index)))
            for index in indices
        ]
        return {name: tensor[chosen] for name, tensor in self._kept.items()}


class Batches:
    """Consecutive batches of a dataset.

    Args:
        dataset: the samples.
        seed: of the samples and of what is drawn for them.
        size: samples a batch.
    """

    def __init__(self, dataset: Dataset, seed: int, size: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._size = size
        self.position = 0
        """Samples given so far: with the seed, all there is to save."""

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        indices = range(self.position, self.position + self._size)
        self.position = indices.stop
        return Batch(self._seed, indices, self._dataset.batch(self._seed, indices))
