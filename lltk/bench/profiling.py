"""How long calls take as they come, launches counted, and whose kernels take it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from lltk.bench.record import percentile


def timed(
    call: Callable[[], object], device: torch.device, runs: int, warm_up: int = 3
) -> dict[str, float]:
    """Median and p90 in milliseconds, by CUDA events on a GPU, else by wall time."""
    for _ in range(warm_up):
        call()
    wait(device)
    times = []
    for _ in range(runs):
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            call()
            end.record(stream)
            wait(device)
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            call()
            times.append((time.perf_counter() - begun) * 1e3)
    return {"median_ms": statistics.median(times), "p90_ms": percentile(times, 0.9)}


def profiled(
    call: Callable[[], object], device: torch.device, owners: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, float], profile | None]:
    """Shares of a call's time on a GPU by owner, idle time too; and the profile, with shapes.

    Args:
        call: what to run once.
        device: where; nothing is profiled on a CPU.
        owners: parts of the names of an owner's kernels, in lower case. The first owner that fits
            has a kernel; the last has what fits none.
    """
    if device.type != "cuda":
        return {}, None
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, record_shapes=True) as found:
        start.record(stream)
        call()
        end.record(stream)
        wait(device)
    total = start.elapsed_time(end) * 1e3
    taken: dict[str, float] = {}
    for event in found.key_averages():
        if event.device_type == DeviceType.CUDA:
            owner = owner_of(event.key, owners)
            taken[owner] = taken.get(owner, 0) + event.self_device_time_total
    taken["idle"] = max(0.0, total - sum(taken.values()))
    return {owner: spent / total for owner, spent in taken.items()}, found


def longest_kernels(found: profile, count: int = 16) -> list[dict[str, Any]]:
    """The kernels that took longest in all: name, launches and milliseconds."""
    kernels = [event for event in found.key_averages() if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return [
        {"name": e.key[:100], "count": e.count, "ms": e.self_device_time_total / 1e3}
        for e in kernels[:count]
    ]


def owner_of(kernel: str, owners: Mapping[str, tuple[str, ...]]) -> str:
    """Whose a kernel is, by its name; see `profiled`."""
    name = kernel.lower()
    fits = (owner for owner, parts in owners.items() if any(part in name for part in parts))
    return next(fits, list(owners)[-1])


def wait(device: torch.device) -> None:
    """Until a GPU has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
