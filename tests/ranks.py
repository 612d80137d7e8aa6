"""Ranks on this machine's CPU: in processes of their own, in this one, or made up."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from lltk.parallel.alike import alike as alone
from lltk.parallel.groups import FRAMES, SEQUENCE, registered

LIMIT = 120
"""Seconds until hung ranks are ended."""
FORKS = multiprocessing.get_context("forkserver")
"""Makes new processes, forked from one that has imported what most need and run nothing."""
FORKS.set_forkserver_preload(["torch._dynamo", "lltk.training", "diffusers.models.transformers"])
Ended = tuple[int, str, str]
"""Exit code, output and errors."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(size: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """A Python process a rank, told what torchrun would tell it."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-P", *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def forked(run: Callable[..., None], given: Sequence[tuple[Any, ...]]) -> None:
    """Run a function in forks of this process, one a tuple of arguments; end it if one fails.

    A process that has run gradients or several threads must not be forked.
    """
    if any(ends(run, given)):
        sys.exit(1)


def ends(run: Callable[..., None], given: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """How forks of this process end, each with its arguments: the exit code or minus a signal."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=each) for each in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        process.kill()
    return [process.exitcode for process in processes]


def saved(save_all: Callable[..., None], *given: object) -> None:
    """Run a function that forks in a new process."""
    process = FORKS.Process(target=save_all, args=given)
    process.start()
    process.join(3 * LIMIT)
    process.kill()
    assert process.exitcode == 0


def ended(processes: Sequence[subprocess.Popen[str]], limit: float = LIMIT) -> list[Ended]:
    """How each process ended. Those that do not end within so many seconds are killed."""
    end = time.monotonic() + limit
    try:
        results = []
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
            results.append((process.returncode, out, err))
        return results
    finally:
        for process in processes:
            process.kill()


@contextmanager
def grouped(rank: int, size: int, port: int, backend: str = "gloo") -> Iterator[None]:
    """This process as a rank."""
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LIMIT),
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        with registered(SEQUENCE, group), registered(FRAMES, dist.new_group(backend="gloo")):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def alike(size: int = 2, rank: int = 0) -> Iterator[None]:
    """Let exchanges act as if all other ranks held what this one does, and agreed with it."""

    def gather(values: list[object], own: object, group: Any) -> None:
        values[:] = [own] * size

    with patch.object(dist, "all_gather_object", gather), alone(size, rank):
        yield
