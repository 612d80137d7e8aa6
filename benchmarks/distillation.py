"""Measure the tiny stream in few steps, before and after distillation.

    python benchmarks/distillation.py runs/seed_0 runs/seed_1 runs/seed_2 --minutes 9

Names the folders of finished runs of lltk distil. The losses of all runs are plotted beside the
record. Rows are kept in a folder as they are made. After --minutes the script ends with exit code
3, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lltk.bench.agreement import interval, one_ahead, scored, scorers, summarise, videos
from lltk.bench.quality import DISTANCES, draw_stories
from lltk.bench.record import Record, markdown, markdown_table, write_record
from lltk.bench.script import beside_record, column, script_options, script_parser, script_record
from lltk.files.writing import write_text
from lltk.graph.recipe import open_recipe
from lltk.streaming import StreamPlan, plan_stream
from lltk.train.loop import METRICS
from lltk.train.metrics import Metrics, last_tenth, read_metrics
from lltk.train.plot import Curve, line_plot, running_mean

_METHOD = """\
Captions are drawn with a fixed seed; no model was trained on them. Agreement is the share of shots
that show their caption's shape, colour, motion and background, with Wilson's 95 % interval.
Identity compares a shot's last two seconds with its first two: the mean in per cent. The frame
distance is the root of the mean square of the difference between a frame and the world's own
drawing of what the scorer reads of its shot, in per cent of a channel's range: the mean over shots
of their first frames, and of the others. Means have 95 % intervals. The spread of tints, which no
caption tells, is 1 − |mean exp(2πi·hue)| of the backgrounds: near 100 % if all hues are as
frequent, as in the world, and less if a model prefers some. Runs are named by their folders, and
their averaged adapters are merged."""
PLOT = ".svg"
BEFORE = "before"
HIGH, LOW = "bfloat16", "W4A4, NVFP4 cache"
PRECISIONS = {HIGH: ("tiny_stream", "bfloat16"), LOW: ("tiny_stream_nvfp4", "bfloat16")}
"""The recipe of each precision, and the dtype of what it does not quantise."""
SEED = 22_000
SHOTS, CHUNKS, CHUNK = 3, 6, 3
FEW, SOME, MANY = 2, 4, 50
MARGIN = 1.1
"""How many times as large as that of many steps a distance may be."""
AGAIN = 3
"""The exit code where rows are left for the same command."""


@dataclass(frozen=True)
class Cell:
    """What a row is of.

    Attributes:
        precision: one of `PRECISIONS`.
        model: `BEFORE`, or the name of a run.
        steps: denoising passes a chunk.
    """

    precision: str
    model: str
    steps: int


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument("runs", nargs="*", type=Path, help="folders of finished runs of lltk distil")
    made.add_argument("--videos", type=int, default=336, help=f"of {SHOTS} shots, for a row")
    made.add_argument("--before", type=int, nargs="*", default=[MANY, SOME, FEW])
    made.add_argument("--after", type=int, nargs="*", default=[SOME, FEW])
    made.add_argument("--precisions", nargs="*", default=[*PRECISIONS], choices=[*PRECISIONS])
    made.add_argument("--minutes", type=float, help="after these no further row is begun")
    made.add_argument(
        "--rows", type=Path, default=Path("runs/distillation_rows"), help="keeps rows that are made"
    )
    made.add_argument("--workers", type=int, default=8, help="processes that score")
    return made


def rows(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """The precision, the model and the number of steps of each row that a command makes."""
    return [(cell.precision, cell.model, cell.steps) for cell in _cells(options)]


def _cells(options: argparse.Namespace) -> list[Cell]:
    models = {BEFORE: options.before} | {run.name: options.after for run in options.runs}
    return [
        Cell(precision, model, steps)
        for precision in options.precisions
        for model, counts in models.items()
        for steps in counts
    ]


def main() -> None:
    """Measure the rows that are not there yet; write the record when all are."""
    options = script_options(parser(), PLOT)
    names = [BEFORE, *(run.name for run in options.runs)]
    if same := [name for name in names if names.count(name) > 1]:
        sys.exit(f"{same[0]}: names two models; rename the folder of a run")
    losses = {run.name: read_metrics(run / METRICS) for run in options.runs}
    if absent := [run for run in options.runs if not (run / "lora.safetensors").is_file()]:
        sys.exit(f"{absent[0]}: has no lora.safetensors; finish the run with lltk distil --resume")
    with scorers(options.workers) as pool:
        found = list(_results(options, pool))
    if len(found) < len(_cells(options)):
        print(f"{len(found)} of {len(_cells(options))} rows are made; the same command goes on")
        sys.exit(AGAIN)
    for row in found:
        row |= _trained(losses.get(row["model"], []))
    record = script_record("distillation", _METHOD, found)
    write_record(options.output, record, text(record))
    if losses:
        write_text(beside_record(options.output, PLOT), _plot(losses))


def _results(options: argparse.Namespace, pool: Executor) -> Iterator[dict[str, Any]]:
    """The rows that there are by the time that the script may take."""
    begun = time.monotonic()
    runs = {run.name: run / "lora.safetensors" for run in options.runs}

    def measured() -> Iterator[Callable[[], dict[str, Any]]]:
        for cell in _cells(options):
            adapter = runs.get(cell.model)
            path = options.rows / f"{_key(cell, adapter, options)}.json"
            if path.is_file():
                yield partial(json.loads, path.read_text())
            elif options.minutes is None or time.monotonic() < begun + 60 * options.minutes:
                yield _measured(cell, adapter, options, pool, path)

    for row in one_ahead(measured()):
        yield row()


def _key(cell: Cell, adapter: Path | None, options: argparse.Namespace) -> str:
    """Names all that a row depends on, but the code."""
    contents = sha256(adapter.read_bytes() if adapter else b"").hexdigest()
    about = json.dumps([asdict(cell), options.videos, options.device, contents])
    return sha256(about.encode()).hexdigest()[:16]


def _measured(
    cell: Cell, adapter: Path | None, options: argparse.Namespace, pool: Executor, path: Path
) -> Callable[[], dict[str, Any]]:
    """Make a row's videos and start to score them; the result waits, and keeps the row."""
    stories = draw_stories(SEED, options.videos, SHOTS, CHUNKS, CHUNK)
    films = videos(_plan(cell, adapter, options), stories, cell.steps, SEED)
    scores = scored(pool, films, stories)

    def row() -> dict[str, Any]:
        found = asdict(cell) | asdict(summarise(scores()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))
        print(json.dumps(found), flush=True)
        return found

    return row


def _plan(cell: Cell, adapter: Path | None, options: argparse.Namespace) -> StreamPlan:
    recipe, dtype = PRECISIONS[cell.precision]
    overrides = [f"geometry.batch={options.videos}", f"model.dtype={dtype}"]
    if adapter is not None:
        overrides.append(f"model.lora={adapter}")
    return plan_stream(open_recipe(recipe, overrides), torch.device(options.device))


def _trained(metrics: list[Metrics]) -> dict[str, Any]:
    """How a run was trained; nothing before any."""
    if not metrics:
        return {}
    last = last_tenth(metrics)
    return {
        "trained": metrics[-1].step,
        "seconds": fmean(each.seconds for each in metrics),
        "loss": fmean(each.loss for each in last),
        "critic_loss": fmean(each.losses["critic"] for each in last),
    }


def text(record: Record) -> str:
    """The record as Markdown; what each run was to reach is a table of its own."""
    table = markdown(
        record,
        "The tiny stream before and after distillation",
        {
            "precision": lambda row: row["precision"],
            "model": lambda row: row["model"],
            "steps": lambda row: str(row["steps"]),
            "shots": lambda row: str(row["shots"]),
            "agreement %": lambda row: interval(row["agreement"]),
            "motion %": lambda row: interval(row["parts"]["motion"]),
            "identity %": lambda row: interval(row["identity"]),
            **{
                heading: lambda row, key=key: interval(row[key])
                for key, heading in DISTANCES.items()
            },
            "tint spread %": column("tint_spread", ".0f"),
        },
    )
    found = {(row["precision"], row["model"], row["steps"]): row for row in record.results}
    lines = [
        [precision, model, *_reached(row, found)]
        for (precision, model, steps), row in found.items()
        if model != BEFORE and steps == FEW and _bounds(precision) <= found.keys()
    ]
    headings = [
        "two steps after", "run", "agreement, not below four steps before", "identity, likewise",
        f"first frames, ≤ {MARGIN} × 50 steps before", "other frames, likewise",
    ]  # fmt: skip
    return "\n".join([table, *markdown_table(headings, lines)]) + "\n" if lines else table


def _bounds(precision: str) -> set[tuple[str, str, int]]:
    """The rows that a distilled stream is compared with."""
    return {(precision, BEFORE, SOME), (precision, BEFORE, MANY)}


def _reached(
    row: Mapping[str, Any], found: Mapping[tuple[str, str, int], Mapping[str, Any]]
) -> list[str]:
    """Whether two steps are as good as they should be, by column."""
    some, many = (found[row["precision"], BEFORE, steps] for steps in (SOME, MANY))
    kept = [row[key][2] >= some[key][1] for key in ("agreement", "identity")]
    ratios = [row[key][0] / many[key][0] for key in DISTANCES]
    near = [f"{_yes(ratio <= MARGIN)} ({ratio:.2f})" for ratio in ratios]
    return [*map(_yes, kept), *near]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _plot(runs: Mapping[str, list[Metrics]]) -> str:
    """Both losses of all runs over their steps, as an SVG."""
    curves = []
    for number, steps in enumerate(runs.values()):
        losses = {"student": [each.loss for each in steps]}
        losses["critic"] = [each.losses["critic"] for each in steps]
        for (name, values), colour in zip(losses.items(), ("#036", "#c40"), strict=True):
            points = list(zip((each.step for each in steps), running_mean(values), strict=True))
            curves.append(Curve("" if number else name, points, colour))
    return line_plot(curves, "running means of both losses over steps, a pair for each run")


if __name__ == "__main__":
    main()
