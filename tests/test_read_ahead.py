"""Samples are read before they are asked for, each once, and are the same."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
import torch
from helpers import refused
from torch import Tensor

from lltk.train.data import Batches
from lltk.train.folder import Sample
from lltk.train.read_ahead import ReadAhead

pytestmark = pytest.mark.cpu


class Slow:
    """Samples that note who reads them, and wait until they may be read."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.done = threading.Event()

    def sample(self, seed: int, index: int) -> Sample:
        if index == 13:
            raise ValueError(f"sample {index}: its clip is damaged")
        self.read.append((seed, index))
        self.threads.add(threading.get_ident())
        if index == 4:
            self.done.set()
        video = torch.full((1, 2, 2, 3), seed + index, dtype=torch.uint8)
        return Sample(video, ("a",), (True,))


class Latents:
    def __init__(self, samples: ReadAhead) -> None:
        self._samples = samples

    def ahead(self, seed: int, indices: range) -> None:
        self._samples.ahead(seed, indices)

    def batch(self, seed: int, indices: range) -> Mapping[str, Tensor]:
        return {"video": torch.stack([self._samples.sample(seed, i).video for i in indices])}


def test_the_next_samples_are_read_meanwhile() -> None:
    samples = Slow()
    batches = Batches(Latents(ReadAhead(samples)), 7, 2, group=1, groups=2)
    batches.position = -2
    found = next(batches)
    assert found.indices == range(2) and not samples.done.is_set()
    assert found.tensors["video"][:, 0, 0, 0, 0].tolist() == [7, 8]
    assert samples.done.wait(10)  # sample 4 is of the batch that follows
    assert threading.get_ident() not in samples.threads


def test_each_sample_is_read_once() -> None:
    samples = Slow()
    ahead = ReadAhead(samples)
    ahead.ahead(1, range(3, 5))
    assert samples.done.wait(10)  # by itself: nobody has asked for it
    assert int(ahead.sample(1, 4).video[0, 0, 0, 0]) == 5
    assert int(ahead.sample(1, 3).video[0, 0, 0, 0]) == 4
    assert int(ahead.sample(2, 3).video[0, 0, 0, 0]) == 5  # of another seed
    assert samples.read == [(1, 3), (1, 4), (2, 3)]


def test_an_error_waits_for_who_asks() -> None:
    ahead = ReadAhead(Slow())
    ahead.ahead(1, range(13, 14))
    assert int(ahead.sample(1, 12).video[0, 0, 0, 0]) == 13
    assert refused(ahead.sample, 1, 13) == "sample 13: its clip is damaged"
