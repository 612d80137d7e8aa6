"""Numbered samples. Everything random about sample i follows from a seed and i.

A step's batch therefore depends neither on how it is split into calls nor on what ran before it. A
resumed run sees the samples that it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lltk.parallel.mesh import ALONE, Mesh
from lltk.train.progress import Note, silent


class Dataset(Protocol):
    """An endless row of numbered samples."""

    def batch(self, seed: int, indices: range) -> Mapping[str, Tensor]:
        """The samples of these numbers, stacked along the first axis of each tensor.

        Sample i is the same at every call, whichever samples are asked for with it. Draw what is
        random about it from `generator_at(seed, …, i)`.
        """


@runtime_checkable
class ReadsAhead(Protocol):
    """A dataset that can begin to read samples before they are asked for."""

    def ahead(self, seed: int, indices: range) -> None:
        """Begin to read the samples of these numbers; what else was begun is dropped."""


def generator_at(
    seed: int, *counters: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A random generator, seeded by a hash of the seed and the counters.

    Equal arguments give equal numbers, except that a CPU and a GPU draw different ones.
    """
    digest = hashlib.sha256(repr((seed, *counters)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


HELD_OUT = 16
"""Samples of a validation, at least: those of the seed ~s of a run with the seed s."""


def held_out(clips: int) -> int:
    """Samples of a validation that takes so many in a call."""
    return -(-HELD_OUT // clips) * clips


def in_epochs(seed: int, count: int, indices: range) -> list[int]:
    """Which of a few samples the samples of these numbers are.

    In each epoch every one of them is asked for once, in an order of the epoch's own.

    Args:
        seed: of the orders.
        count: how many there are to choose from.
        indices: numbers of samples, without end.
    """
    orders = {
        epoch: torch.randperm(count, generator=generator_at(seed, "epoch", epoch))
        for epoch in {index // count for index in indices}
    }
    return [int(orders[index // count][index % count]) for index in indices]


@dataclass(frozen=True)
class Batch:
    """Consecutive samples, and random numbers for each.

    A sample's random numbers follow from the seed, its number and a purpose. The purpose is any
    name, such as ``noise``; two purposes have different numbers.

    Attributes:
        seed, indices: the seed and the numbers of the samples.
        tensors: the samples by name, stacked along the first axis.
    """

    seed: int
    indices: range
    tensors: Mapping[str, Tensor]

    def normal(self, purpose: str, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers, float32 [B, *shape], drawn and left on the device."""
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


def first_samples(
    dataset: Dataset,
    seed: int,
    count: int,
    block: int = 64,
    note: Note = silent,
    mesh: Mesh = ALONE,
) -> dict[str, Tensor]:
    """A dataset's first samples of a seed, which ranks make together; the same on all.

    They are, bit for bit, what one process makes. All ranks must call it.

    Args:
        dataset: makes the samples, each rank's for itself.
        seed: of the samples.
        count: how many.
        block: how many are made at once. The ranks take blocks in turn.
        note: told how many are made.
        mesh: the ranks.
    """
    blocks = [range(start, min(start + block, count)) for start in range(0, count, block)]
    made = {}
    for number in range(mesh.rank, len(blocks), mesh.size):
        note("encoding clips", blocks[number].start, count)
        made[number] = dataset.batch(seed, blocks[number])
    every = [mesh.spread(made.get(n), n % mesh.size) for n in range(len(blocks))]
    note("encoding clips", count, count)
    return {name: torch.cat([part[name] for part in every]) for name in every[0]}


class Kept:
    """A dataset whose samples of one seed are a few that are kept.

    Each epoch asks for each of them once; see `in_epochs`. Samples of other seeds, such as held-out
    ones, are the dataset's own.

    Args:
        dataset: makes the other samples.
        seed: the seed of the kept samples.
        kept: the samples, as a batch of the dataset.
    """

    def __init__(self, dataset: Dataset, seed: int, kept: Mapping[str, Tensor]) -> None:
        self._dataset = dataset
        self._seed = seed
        self._kept = kept
        self._count = len(next(iter(kept.values())))

    def batch(self, seed: int, indices: range) -> Mapping[str, Tensor]:
        if seed != self._seed:
            return self._dataset.batch(seed, indices)
        chosen = in_epochs(seed, self._count, indices)
        return {name: tensor[chosen] for name, tensor in self._kept.items()}


class Batches:
    """An endless iterator over consecutive batches of a dataset.

    Args:
        dataset: makes the samples.
        seed: the seed of the samples and of the random numbers that go with them.
        size: samples in a batch.
        group, groups: of so many iterators, which take the batches in turn, the number of this one.
    """

    def __init__(
        self, dataset: Dataset, seed: int, size: int, group: int = 0, groups: int = 1
    ) -> None:
        self._dataset = dataset
        self._seed = seed
        self._size = size
        self._group = group
        self._groups = groups
        self.position = 0
        """How many samples all of them gave so far. Set it to go on from another place."""

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        batch = Batch(self._seed, self._next, self._dataset.batch(self._seed, self._next))
        self.position += self._groups * self._size
        if isinstance(self._dataset, ReadsAhead):
            self._dataset.ahead(self._seed, self._next)
        return batch

    @property
    def _next(self) -> range:
        start = self.position + self._group * self._size
        return range(start, start + self._size)
