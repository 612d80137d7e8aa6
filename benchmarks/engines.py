"""Build every engine of the 5B, look at its layers, and measure time, memory and size.

Weights are random. It needs TensorRT for RTX and no GPU, and runs no engine. Its files, 10 GB, are
temporary ones, which lie where TMPDIR says.

python benchmarks/engines.py
python benchmarks/engines.py --attention plugin
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.bench.views import with_views
from lltk.export.bundle import emit
from lltk.export.emitter import Dialect
from lltk.export.engines import EngineOrder, build_engine
from lltk.export.kernels import kernel_sizes, write_kernels
from lltk.export.layers import lint, meant, summary
from lltk.exporting import plan_export
from lltk.files.writing import whole_folder
from lltk.graph.memory import readable
from lltk.graph.recipe import open_recipe

RECIPE = "wan22_5b_stream_nvfp4"


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, device=False)
    made.add_argument("--sm", type=int, default=120, help="compute capability (default: 120)")
    made.add_argument("--attention", choices=["native", "plugin"], default="native")
    return made


def main() -> None:
    """Build and write the record."""
    options = script_options(parser())
    with TemporaryDirectory() as place:
        results = list(_built(Path(place), options.sm, options.attention == "plugin"))
    method = f"""
        Engines of {RECIPE} in its own geometry, for compute capability {options.sm / 10}, with
        random weights, one after another, each in a process of its own; memory is the most that
        this process held. Attention is {options.attention}. The last column counts products in FP4
        and attentions that have no fast layer. Engines were not run.
        """
    record = script_record("engines", method, results)
    write_record(options.output, record, text(record))
    print(text(record))


def _built(place: Path, sm: int, plugin: bool) -> Iterator[dict[str, Any]]:
    """A row for each engine."""
    order = EngineOrder(sm, plugin=plugin)
    plan = plan_export(open_recipe(RECIPE), weights=False, text="reference", engines=order)
    sizes = kernel_sizes(plan.transformer)
    names = {stage: list(program.graphs) for stage, program in plan.stages.items()}
    with whole_folder(place / "bundle") as new:
        if sizes:
            write_kernels(new, sizes, sm, under="kernels")
        for stage, program in plan.stages.items():
            pool, models = emit(with_views(program), Dialect.TENSORRT)
            pool.write(new, stage, models)
    del plan, program, pool, models
    for stage, graphs in names.items():
        for graph in graphs:
            path, engine = place / "bundle" / stage / f"{graph}.onnx", place / "engine"
            made = build_engine(path, engine, sm, place / "bundle" / "kernels" if sizes else None)
            wanted = meant(onnx.load(path, load_external_data=False))
            yield {
                "name": f"{stage}/{graph}",
                "seconds": made.seconds,
                "peak_bytes": made.peak_bytes,
                "engine_bytes": engine.stat().st_size,
                "slow": len(list(lint(wanted, made.layers))),
                "layers": summary(made.layers),
            }


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "engine": lambda row: row["name"],
        "built in s": column("seconds", ".0f"),
        "memory": lambda row: readable(row["peak_bytes"]),
        "size": lambda row: readable(row["engine_bytes"]),
        "layers": lambda row: ", ".join(f"{n} × {does}" for does, n in row["layers"].items()),
        "slow": column("slow", "d"),
    }
    table = markdown(record, "Engines of 5 billion parameters", columns)
    size = sum(row["engine_bytes"] for row in record.results)
    return f"{table}\nTogether they have {size / 1e9:.2f} GB ({readable(size)}).\n"


if __name__ == "__main__":
    main()
