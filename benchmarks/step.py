"""Time a denoising pass and a commit of an older checkout and of this one, in turns in one run.

    git worktree add .old 32daab1
    python benchmarks/step.py --old .old wan22_5b_stream_fp8 benchmarks/dit/decode_each_pass.yaml

A row is a recipe of this checkout; the first recipe also runs as the older checkout has it. Files
are relative to their checkout. Each row has a process of its own, and the others wait while one
measures. To be quick, nothing runs eagerly and nothing is profiled: `benchmarks/dit.py` does that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.bench.sides import Ask, in_turns, side
from lltk.graph.memory import readable

_METHOD = """\
Milliseconds of {runs} passes after three that warm up, with a full cache, timed by {how}. Rows
measure in turns, {rounds} rounds each. A row's median and 90th percentile are of the round whose
median is the middle one, and its range is that of its rounds' medians. Times as fast is the first
row's median over a row's. Products alone are the pass's linears and its attention, each timed by
itself in the same run and counted as often as the pass makes it; the column after them is their
share of the step. DiT FPS is a chunk's video frames over the seconds of its denoising passes and
its commit. Output is a hash of a pass's result. Weights are random and have the true shapes."""
_HERE = Path(__file__).resolve()


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = script_parser(__file__, __doc__, runs=10)
    made.add_argument("recipes", nargs="*", default=["wan22_5b_stream_fp8"], metavar="RECIPE")
    made.add_argument("--old", type=Path, required=True, help="an older checkout")
    made.add_argument("--rounds", type=int, default=3)
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    names = [Path(recipe).stem for recipe in options.recipes]
    return [f"{names[0]}, old", *names]


def measured(sides: Mapping[str, Ask], rounds: int) -> list[dict[str, Any]]:
    """A row for each side."""
    results = {name: {"name": name, **ask("about")} for name, ask in sides.items()}
    for what in ("step", "commit"):
        asks = {name: partial(ask, what) for name, ask in sides.items()}
        for name, found in in_turns(asks, rounds).items():
            medians = [each["median_ms"] for each in found]
            results[name][what] = {**found[rounds // 2], "range_ms": [medians[0], medians[-1]]}
    first = next(iter(results.values()))["step"]["median_ms"]
    for name, row in results.items():
        step, commit = row["step"]["median_ms"], row["commit"]["median_ms"]
        row["times_as_fast"] = first / step
        row["products_ms"] = sum(part["ms"] for part in sides[name]("products").values())
        row["products_share"] = row["products_ms"] / step
        row["dit_fps"] = {str(n): row["frames"] / (n * step + commit) * 1e3 for n in (4, 2)}
    return list(results.values())


def main() -> None:
    """Measure and write the record."""
    options = script_options(parser())
    checkouts = [options.old, *(_HERE.parents[1] for _ in options.recipes)]
    with ExitStack() as stack:
        sides = {}
        recipes = [options.recipes[0], *options.recipes]
        for name, checkout, recipe in zip(rows(options), checkouts, recipes, strict=True):
            given = {"recipe": recipe, "device": options.device, "runs": options.runs}
            script = _HERE.parent / "step" / "side.py"
            sides[name] = stack.enter_context(side(script, checkout, given))
        results = measured(sides, options.rounds)
    how = "the wall clock" if options.device == "cpu" else "CUDA events"
    method = _METHOD.format(runs=options.runs, rounds=options.rounds, how=how)
    record = script_record("step", method, results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""

    def of(what: str, key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: f"{row[what][key]:.1f}"

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "recipe": lambda row: row["name"],
        "commit": lambda row: row["checkout"],
        "step ms": of("step", "median_ms"),
        "p90": of("step", "p90_ms"),
        "range": lambda row: " to ".join(f"{ms:.1f}" for ms in row["step"]["range_ms"]),
        "times as fast": column("times_as_fast", ".3f"),
        "products alone ms": column("products_ms", ".1f"),
        "of the step": column("products_share", ".1%"),
        "commit ms": of("commit", "median_ms"),
        "DiT FPS, 4 steps": of("dit_fps", "4"),
        "2 steps": of("dit_fps", "2"),
        "peak memory": lambda row: readable(row["peak_bytes"]),
        "output": lambda row: row["output"],
        "ran": lambda row: ", ".join(f"{op} {how}" for op, how in row["ran"].items()),
    }
    return markdown(record, "A denoising pass, old and new", columns)


if __name__ == "__main__":
    main()
