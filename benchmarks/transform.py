"""Time and memory of ``lltk transform`` without weights, as whole processes.

    .venv/bin/python benchmarks/transform.py [--runs 5]

Writes transform.json and transform.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lltk.bench.record import make_record, markdown, percentile, write_record
from lltk.graph.memory import readable

HERE = Path(__file__).parent
RECIPES = ("wan22_5b_stream", "wan22_5b_train", "tiny_stream")


def measure(recipe: str, runs: int) -> dict[str, Any]:
    """Whole-process wall seconds and peak resident bytes, after one warm-up run."""
    lltk = Path(sys.executable).with_name("lltk")
    command = [str(lltk), "transform", recipe, "--no-weights", "--json"]
    seconds, peaks, log = [], [], []
    for run in range(runs + 1):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        result = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        if run:
            seconds.append(time.perf_counter() - start)
            peaks.append(usage.ru_maxrss * 1024)
            log = [
                {key: entry[key] for key in ("name", "matches", "seconds")}
                for entry in result["log"]
            ]
    return {
        "recipe": recipe,
        "seconds": {"median": statistics.median(seconds), "p90": percentile(seconds, 0.9)},
        "peak_bytes": max(peaks),
        "passes": log,
    }


def main() -> None:
    """Measure every recipe and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    record = make_record(
        "transform",
        "lltk transform RECIPE --no-weights --json",
        f"Whole processes, {runs} runs after one warm-up.",
        [measure(recipe, runs) for recipe in RECIPES],
    )
    text = markdown(
        record,
        "Transforming without weights",
        {
            "recipe": lambda result: result["recipe"],
            "median s": lambda result: f"{result['seconds']['median']:.1f}",
            "p90 s": lambda result: f"{result['seconds']['p90']:.1f}",
            "peak memory": lambda result: readable(result["peak_bytes"]),
        },
    )
    write_record(HERE / "transform", record, text)
    print(text)


if __name__ == "__main__":
    main()
