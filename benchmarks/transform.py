"""Time and memory of ``lltk transform`` without weights, as whole processes.

    .venv/bin/python benchmarks/transform.py [--runs 5]

Writes transform.json and transform.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lltk.artefact import versions
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


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor()


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    made = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        "# Transforming without weights",
        "",
        f"Whole process, {record['runs']} runs after one warm-up, on {record['hardware']}; "
        f"commit {record['commit']}; {made}. Command: `{record['command']}`.",
        "",
        "| recipe | median s | p90 s | peak memory |",
        "|---|---|---|---|",
    ]
    for row in record["results"]:
        seconds = row["seconds"]
        lines.append(
            f"| {row['recipe']} | {seconds['median']:.1f} | {seconds['p90']:.1f} | "
            f"{readable(row['peak_bytes'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every recipe and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    record = {
        "benchmark": "transform",
        "command": "lltk transform RECIPE --no-weights --json",
        "hardware": f"{cpu()}, {len(os.sched_getaffinity(0))} cores, no GPU",
        "versions": versions(),
        "commit": commit(),
        "warm_up_runs": 1,
        "runs": runs,
        "results": [measure(recipe, runs) for recipe in RECIPES],
    }
    (HERE / "transform.json").write_text(json.dumps(record, indent=2) + "\n")
    (HERE / "transform.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
