"""Seconds that parts of a stream take, without waiting for a device in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by name: the device's on a GPU, by events on the current stream.

    Args:
        device: what is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add what the block takes to ``name``."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self._device)
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((name, start, end))
            return
        begun = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - begun)

    def read(self) -> dict[str, float]:
        """The sums since the last reading; on a GPU once what was measured is done."""
        for name, start, end in self._events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1e3)
        sums = self._seconds
        self._events, self._seconds = [], {}
        return sums

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
