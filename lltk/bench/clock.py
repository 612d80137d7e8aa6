"""How long calls take on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from lltk.bench.record import percentile

_CACHE_BYTES = 256 * 2**20


class Clock:
    """Times calls on a device; on CUDA with cold caches and as graphs, without launches.

    Attributes:
        method: how, for a record.
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
        """Median and p90 in milliseconds."""
        call()
        times = self._graph(call) if self.cuda else [self._wall(call) for _ in range(self.runs)]
        return {"median_ms": statistics.median(times), "p90_ms": percentile(times, 0.9)}

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
