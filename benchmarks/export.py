"""Measure how long the 5B's graphs take to become ONNX, and in how much memory.

Weights are random. The files, 20 GB a recipe and more, are deleted again.

python benchmarks/export.py
python benchmarks/export.py --recipes wan22_5b_stream_nvfp4 --folder /scratch
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.bench.views import with_views
from lltk.export.bundle import emit
from lltk.exporting import plan_export
from lltk.files.writing import whole_folder
from lltk.graph.memory import readable
from lltk.graph.recipe import open_recipe

RECIPES = ("wan22_5b_stream", "wan22_5b_stream_nvfp4")
FLOAT32 = ("model.dtype=float32", "stream.decoder.dtype=float32")


def measure(recipe: str, folder: Path) -> dict[str, Any]:
    """Seconds of each part of an export, the bytes written, and the peak of resident bytes."""
    start = time.perf_counter()
    plan = plan_export(open_recipe(recipe, FLOAT32), weights=False, text="reference")
    planned = time.perf_counter()
    programs = {stage: with_views(program) for stage, program in plan.stages.items()}
    began = time.perf_counter()
    models = {stage: emit(program) for stage, program in programs.items()}
    emitted = time.perf_counter()
    with TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "bundle"
        with whole_folder(path) as new:
            for stage, (pool, graphs) in models.items():
                pool.write(new, stage, graphs)
        written = time.perf_counter()
        for graph in sorted(path.glob("*/*.onnx")):
            onnx.checker.check_model(graph)
        checked = time.perf_counter()
        weights = sum(file.stat().st_size for file in path.glob("*/*.safetensors"))
    return {
        "recipe": recipe,
        "nodes": sum(len(g.graph.node) for _, graphs in models.values() for g in graphs.values()),
        "weight_bytes": weights,
        "plan_s": planned - start,
        "emit_s": emitted - began,
        "write_s": written - emitted,
        "check_s": checked - written,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, device=False)
    made.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES, help="of them")
    made.add_argument("--folder", type=Path, help="where to write (default: for temporary files)")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return list(options.recipes)


def main() -> None:
    """Measure every recipe in a process of its own, and write the record."""
    options = script_options(parser())
    method = """
        One export a recipe, each in a process of its own, in float32 and without the text encoder.
        Planning captures the model and runs the passes; emitting makes the graphs in ONNX; writing
        brings weights and graphs to the disk, with checksums; checking is onnx.checker's, with
        external data. Golden values are left out. Weights are views of one random tensor, so that
        the peak of resident memory is what the export needs beyond them.
        """
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        results = [
            processes.submit(measure, recipe, options.folder).result() for recipe in rows(options)
        ]
    record = script_record("export", method, results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "recipe": lambda row: row["recipe"],
        "nodes": column("nodes", "d"),
        "weights": lambda row: readable(row["weight_bytes"]),
        "plan s": column("plan_s", ".1f"),
        "emit s": column("emit_s", ".1f"),
        "write s": column("write_s", ".1f"),
        "check s": column("check_s", ".1f"),
        "peak memory": lambda row: readable(row["peak_bytes"]),
    }
    return markdown(record, "Graphs of 5 billion parameters in ONNX", columns)


if __name__ == "__main__":
    main()
