"""How long a call takes by itself, and how near it comes to the memory's bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lltk.bench.record import percentile

_CACHE_BYTES = 256 * 2**20


class Clock:
    """Times calls on a device.

    On CUDA a call is recorded as a graph, so that launching its kernels costs nothing, and the
    caches are overwritten before each replay.

    Attributes:
        method: how calls are timed, for a record.
    """

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device = device
        self.runs = runs
        self.cuda = device.type == "cuda"
        self.cache = torch.empty(_CACHE_BYTES if self.cuda else 1, dtype=torch.uint8, device=device)
        how = "CUDA events around a graph's replay" if self.cuda else "wall time"
        cold = " 256 MiB are written before each, so that caches are cold." if self.cuda else ""
        self.method = f"Milliseconds of {runs} runs after one warm-up: {how}.{cold}"

    def __call__(self, call: Callable[[], object]) -> dict[str, float]:
        """The median and the 90th percentile, in milliseconds."""
        call()
        times = self._graph(call) if self.cuda else [self._wall(call) for _ in range(self.runs)]
        return {"median_ms": statistics.median(times), "p90_ms": percentile(times, 0.9)}

    def beside_copy(self, call: Callable[[], object], size: int) -> dict[str, float]:
        """Times of a call that moves ``size`` bytes, beside those of a copy that moves as many.

        Returns:
            The call's times and GB/s, the copy's milliseconds and GB/s, and ``of_copy``, the call's
            bandwidth as a share of the copy's.
        """
        source = torch.empty(size // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times, copy = self(call), self(lambda: target.copy_(source))["median_ms"]
        return {
            "bytes": size,
            **times,
            "gb_s": size / times["median_ms"] / 1e6,
            "copy_ms": copy,
            "copy_gb_s": size / copy / 1e6,
            "of_copy": copy / times["median_ms"],
        }

    def _wall(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def _graph(self, call: Callable[[], object]) -> list[float]:
        graph, events = torch.cuda.CUDAGraph(), []
        with torch.cuda.device(self.device):
            with torch.cuda.graph(graph):
                call()
            graph.replay()
            for _ in range(self.runs):
                self.cache.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                events.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


def size_of(*values: Any) -> int:
    """Bytes of the tensors among the values; a tuple or list counts as what it holds."""
    return sum(
        value.nbytes if isinstance(value, Tensor) else size_of(*value)
        for value in values
        if isinstance(value, (Tensor, tuple, list))
    )
