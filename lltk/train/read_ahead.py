"""Reading samples from disk while a model trains on those before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

Sample = TypeVar("Sample", covariant=True)


class Samples(Protocol[Sample]):
    """Numbered samples on disk."""

    def sample(self, seed: int, index: int) -> Sample:
        """The sample of a number, which follows from the arguments and the files alone."""


class ReadAhead(Generic[Sample]):
    """Samples of which some are read by a thread of its own before they are asked for.

    Args:
        samples: what reads them, which the thread and the caller use one at a time.
    """

    def __init__(self, samples: Samples[Sample]) -> None:
        self._samples = samples
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun: dict[tuple[int, int], Future[Sample]] = {}

    def sample(self, seed: int, index: int) -> Sample:
        """The sample of a number, and any error of reading it."""
        begun = self._begun.pop((seed, index), None)
        if begun is None:
            begun = self._thread.submit(self._samples.sample, seed, index)
        return begun.result()

    def ahead(self, seed: int, indices: range) -> None:
        """Begin to read the samples of these numbers; what else was begun is dropped."""
        for future in self._begun.values():
            future.cancel()
        self._begun = {
            (seed, index): self._thread.submit(self._samples.sample, seed, index)
            for index in indices
        }
