"""Stream a bundle through ONNX Runtime, and its recipe through torch, each as a whole process.

python benchmarks/bundle.py
python benchmarks/bundle.py --threads 1 2 --seconds 15 --runs 3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.bench.stream import METHOD, measure
from lltk.graph.memory import readable
from lltk.graph.recipe import open_recipe
from lltk.streaming import is_bundle, plan_bundle, plan_stream

_METHOD = """\
Every row is a process of its own, with so many threads for each op of the transformer and as many
for the decoder, which runs beside it. Start to first frame: from the start of another process,
through its imports, the reading and loading of weights and the encoding of a prompt, to the first
frame in the file. {best} Gain: E2E FPS over that of torch's best row; the same for DiT and
decoder."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=3, device=False)
    made.add_argument("--recipe", default="tiny_stream", help="what streams (default: tiny_stream)")
    made.add_argument("--seconds", type=float, default=15.0, help="of video a run (default: 15)")
    made.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="settings to try (default: 1 2)"
    )
    made.add_argument("--row", nargs=2, metavar=("WHAT", "START"), help=argparse.SUPPRESS)
    return made


def rows(options: argparse.Namespace) -> list[tuple[str, int]]:
    """What a row streams by, and its threads."""
    return [(name, count) for count in options.threads for name in ("torch", "ONNX Runtime")]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row, in this process."""
    what, start = options.row
    torch.set_num_threads(options.threads[0])
    plan = plan_bundle(Path(what)) if is_bundle(what) else plan_stream(open_recipe(what))
    planned = time.time()
    found = measure(plan, options.seconds, plan.geometry.pages, options.runs)
    first = found["warm_up"]["loading_seconds"] + found["first_frame_seconds"]
    return found | {"start_to_first_frame": planned - float(start) + first}


def process(options: argparse.Namespace, what: str, threads: int, short: bool) -> dict[str, Any]:
    """Measure one row in a process of its own; a short one makes a chunk more than it warms up."""
    line = [sys.executable, __file__, "--row", what, str(time.time()), "--threads", str(threads)]
    runs, seconds = (1, 0.1) if short else (options.runs, options.seconds)
    line += ["--runs", str(runs), "--seconds", str(seconds)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    made["ran"].pop("bundle", None)  # a folder that is gone when the record is read
    return made


def main() -> None:
    """Measure every row and write the record."""
    made = parser()
    if "--row" in sys.argv:
        print(json.dumps(run(made.parse_args())))
        return
    options = script_options(made)
    results = []
    with TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        # Not in this process: what it holds would count as its children's peak.
        line = [sys.executable, "-m", "lltk", "export", options.recipe, "--target", "ort"]
        subprocess.run([*line, "-o", str(bundle)], stdout=subprocess.DEVNULL, check=True)
        sources = {"torch": options.recipe, "ONNX Runtime": str(bundle)}
        for name, threads in rows(options):
            found = process(options, sources[name], threads, short=False)
            first = process(options, sources[name], threads, short=True)
            found["start_to_first_frame"] = first["start_to_first_frame"]
            results.append({"name": name, "threads": threads} | found)
    base = max((row for row in results if row["name"] == "torch"), key=lambda row: row["e2e_fps"])
    for row in results:
        row["gain"] = {key: row[key] / base[key] for key in ("dit_fps", "decode_fps", "e2e_fps")}
    method = _METHOD.format(best=METHOD)
    record = script_record("bundle", method, results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""

    def gain(key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: f"{row[key]:.1f} ({row['gain'][key]:.2f}×)"

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "runtime": lambda row: row["name"],
        "threads": lambda row: str(row["threads"]),
        "DiT FPS (gain)": gain("dit_fps"),
        "decode FPS (gain)": gain("decode_fps"),
        "E2E FPS (gain)": gain("e2e_fps"),
        "first frame s": lambda row: f"{row['first_frame_seconds']:.2f}",
        "start to first frame s": lambda row: f"{row['start_to_first_frame']:.1f}",
        "chunk p50 s": lambda row: f"{row['chunk_seconds']['p50']:.3f}",
        "chunk p90 s": lambda row: f"{row['chunk_seconds']['p90']:.3f}",
        "peak memory": lambda row: readable(row["memory"]["peak"]["process"]),
    }
    return markdown(record, "A bundle through ONNX Runtime", columns)


if __name__ == "__main__":
    main()
