"""Two ranks on this machine's CPU, for tests of what they make together; run by torchrun's rules."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LIMIT = 120
"""Seconds until hung ranks are ended."""


def start(size: int, *arguments: str | Path, cwd: Path | None = None) -> list[subprocess.Popen[str]]:
    """A Python process a rank, with what torchrun would tell it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
    command = [sys.executable, *sys.orig_argv[1:2], *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            env=os.environ
            | told
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )
        for rank in range(size)
    ]


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, once all have ended."""
    end = time.monotonic() + LIMIT
    try:
        results = []
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
            results.append((process.returncode, out, err))
        return results
    finally:
        for process in processes:
            process.kill()
