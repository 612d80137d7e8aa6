"""Measure the time and memory of ``lltk transform`` without weights, as whole processes.

python benchmarks/transform.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from lltk.bench.record import Record, markdown, percentile, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.graph.memory import readable

RECIPES = ("wan22_5b_stream", "wan22_5b_train", "tiny_stream")


def measure(recipe: str, runs: int) -> dict[str, Any]:
    """Seconds of wall time and the peak of resident bytes of whole processes, after one warm-up."""
    command = [sys.executable, "-m", "lltk", "transform", recipe, "--no-weights", "--json"]
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


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    return script_parser(__file__, __doc__, runs=5, device=False)


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return list(RECIPES)


def main() -> None:
    """Measure every recipe and write the record."""
    options = script_options(parser())
    method = (
        "Whole processes of `lltk transform RECIPE --no-weights --json`: "
        f"{options.runs} runs after one that warms up."
    )
    results = [measure(recipe, options.runs) for recipe in rows(options)]
    record = script_record("transform", method, results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "recipe": lambda row: row["recipe"],
        "median s": lambda row: f"{row['seconds']['median']:.1f}",
        "p90 s": lambda row: f"{row['seconds']['p90']:.1f}",
        "peak memory": lambda row: readable(row["peak_bytes"]),
    }
    return markdown(record, "Transforming without weights", columns)


if __name__ == "__main__":
    main()
