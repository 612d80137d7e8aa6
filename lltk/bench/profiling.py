"""How long a call takes with the launches of its kernels, and which kernels take the time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from lltk.bench.record import percentile


def timed(
    call: Callable[[], object], device: torch.device, runs: int, warm_up: int = 3
) -> dict[str, float]:
    """The median and the 90th percentile, in milliseconds.

    CUDA events time a call on a GPU, the wall clock on a CPU.
    """
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
    return _summary(times)


def launched(call: Callable[[], object], device: torch.device, runs: int) -> dict[str, float]:
    """How long a call keeps the host until it returns, as `timed` gives it.

    The device has nothing to do when a call begins. What a GPU does meanwhile is not waited for.
    """
    times = []
    for _ in range(runs):
        wait(device)
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1e3)
    wait(device)
    return _summary(times)


def _summary(times: Sequence[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(times), "p90_ms": percentile(times, 0.9)}


def profiled(
    call: Callable[[], object], device: torch.device, owners: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, float], profile | None]:
    """Tell which owners' kernels take a call's time on a GPU.

    Args:
        call: what to run, once.
        device: where it runs; on a CPU nothing is profiled.
        owners: by owner, parts of its kernels' names in lower case. A kernel belongs to the first
            owner that fits, and to the last owner if none does.

    Returns:
        Each owner's share of the time, with the share in which the GPU was idle; and the profile,
        with the shapes of operands. On a CPU: no shares, and None.
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
    for event in _kernels(found):
        owner = owner_of(event.key, owners)
        taken[owner] = taken.get(owner, 0) + event.self_device_time_total
    taken["idle"] = max(0.0, total - sum(taken.values()))
    return {owner: spent / total for owner, spent in taken.items()}, found


def longest_kernels(found: profile, count: int = 16) -> list[dict[str, Any]]:
    """The kernels that took the most time in total: name, launches and milliseconds."""
    kernels = sorted(_kernels(found), key=lambda event: -event.self_device_time_total)
    return [
        {"name": e.key[:100], "count": e.count, "ms": e.self_device_time_total / 1e3}
        for e in kernels[:count]
    ]


def _kernels(found: profile) -> list[Any]:
    """What ran on the GPU. Annotations, such as an exchange's name, span kernels and are none."""
    return [
        event
        for event in found.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def owner_of(kernel: str, owners: Mapping[str, tuple[str, ...]]) -> str:
    """The owner of a kernel with this name; see `profiled`."""
    name = kernel.lower()
    fits = (owner for owner, parts in owners.items() if any(part in name for part in parts))
    return next(fits, list(owners)[-1])


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
