"""Measure how well the tiny world's models follow captions and keep what they have shown.

    python benchmarks/quality.py --reference runs/reference/transformer --steps 4
    python benchmarks/quality.py --device cpu --videos 48 --minutes 0 --steps 4
    python benchmarks/quality.py runs/one runs/two --steps 4

Measures the shipped model, or those of finished runs of lltk train, which are named by their
folders. Where shots of 60 s are measured, their identity over time is plotted beside the record.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lltk.bench.agreement import (
    decoded,
    encoded,
    interval,
    lasting,
    one_ahead,
    scored,
    scorers,
    summarise,
    videos,
)
from lltk.bench.quality import DISTANCES, PARTS, STRETCH, ShotScore, draw_stories
from lltk.bench.record import Record, markdown, markdown_table, write_record
from lltk.bench.script import beside_record, script_options, script_parser, script_record
from lltk.compiler import transform
from lltk.files.writing import write_text
from lltk.graph.module import instantiate
from lltk.graph.recipe import open_recipe
from lltk.models.tiny.world import FPS
from lltk.streaming import StreamPlan, plan_stream
from lltk.train.plot import Curve, line_plot
from lltk.train.sampling import sample

_METHOD = """\
Captions are drawn with a fixed seed; no model was trained on them. Agreement is the share of
shots whose shape, colour, motion and background are all as the caption has them, with Wilson's 95
% interval. Identity compares the size, the dot's colour and the background's tint of a shot's
last two seconds with its first two: the mean in per cent, with its 95 % interval. The frame
distance is the root of the mean square of the difference between a frame and the world's own
drawing of what the scorer reads of its shot, in per cent of a channel's range: the mean over shots
of their first frames, and of the others."""
PLOT = "_identity.svg"
SEED = 20_000
SHOTS = 3
CHUNKS = 6
"""Chunks of a shot of 4.5 s."""
REFERENCE_CHUNKS = 5
MINUTE = 80
"""Chunks of a shot of 60 s."""
SINKS = {"window with both sinks": {}, "window without sinks": {"sink": 0}}
COLOURS = ("#036", "#c40", "#06c", "#294")
FULL = {"full window": {"window": 3 * SHOTS * CHUNKS}}
Row = Callable[[], dict[str, Any]]
"""A call that waits for a row's scores and returns the row."""


@dataclass(frozen=True)
class Model:
    """A stream to measure.

    Attributes:
        name: what rows call it.
        pipeline: a folder, or a shipped pipeline's name.
        changes: of the recipe's geometry.
    """

    name: str
    pipeline: str
    changes: Mapping[str, int]


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument("runs", nargs="*", type=Path, help="folders of finished runs of lltk train")
    made.add_argument("--reference", help="the bidirectional model's folder")
    made.add_argument("--videos", type=int, default=336, help=f"of {SHOTS} shots, for a row")
    made.add_argument("--minutes", type=int, default=64, help="single shots of 60 s, for a row")
    made.add_argument("--steps", type=int, nargs="*", default=[4, 50])
    made.add_argument("--models", nargs="*", default=[*FULL, *SINKS], choices=[*FULL, *SINKS])
    made.add_argument("--workers", type=int, default=8, help="processes that score")
    return made


def rows(options: argparse.Namespace) -> list[tuple[str, int]]:
    """The model and the number of steps of each row that a command makes."""
    models = [model.name for model in _models(options)]
    reference = ["bidirectional reference"] if options.reference else []
    minutes = [model.name for model in _models(options, SINKS)] if options.minutes else []
    cells = [(name, steps) for steps in options.steps for name in (*models, *reference)]
    return [*cells, *((name, 4) for name in minutes)]


def main() -> None:
    """Measure every row and write the record."""
    options = script_options(parser(), PLOT)
    with scorers(options.workers) as pool:
        record = script_record("quality", _METHOD, _results(options, pool))
    write_record(options.output, record, text(record))
    curves = {row["model"]: row["over_time"] for row in record.results if "over_time" in row}
    if curves:
        write_text(beside_record(options.output, PLOT), _plot(curves))


def text(record: Record) -> str:
    """The record as Markdown; shots of 60 s have a table of their own."""
    cells = [row for row in record.results if "over_time" not in row]
    long = [row for row in record.results if "over_time" in row]
    table = markdown(
        record.model_copy(update={"results": cells}),
        "Quality on the tiny world",
        {
            "model": lambda row: row["model"],
            "steps": lambda row: str(row["steps"]),
            "shots": lambda row: str(row["shots"]),
            "agreement %": lambda row: interval(row["agreement"]),
            "of those after a cut": lambda row: str(row["later"] or "–"),
            "agreement %, after a cut": lambda row: interval(row["after_cut"]),
            **{f"{part} %": partial(_part, part) for part in PARTS},
            "identity %": lambda row: interval(row["identity"]),
            **{
                heading: lambda row, key=key: interval(row[key])
                for key, heading in DISTANCES.items()
                if all(key in row for row in cells)
            },
        },
    )
    headings = ["60 s", "steps", "shots", "identity % at 2 s", "at 60 s", "change"]
    lines = [
        [
            row["model"],
            str(row["steps"]),
            str(row["shots"]),
            *(interval(row[key]) for key in ("identity_early", "identity", "change")),
        ]
        for row in long
    ]
    return "\n".join([table, *markdown_table(headings, lines)]) + "\n" if long else table


def _part(part: str, row: Mapping[str, Any]) -> str:
    return interval(row["parts"][part])


def _results(options: argparse.Namespace, pool: Executor) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    rows = itertools.chain(_cells(options, device, pool), _minutes(options, device, pool))
    for row in one_ahead(rows):
        found = row()
        print(json.dumps(found)[:600], flush=True)
        yield found


def _models(
    options: argparse.Namespace, among: Mapping[str, dict[str, int]] = FULL | SINKS
) -> list[Model]:
    """The models to measure, with those windows that are to be measured."""
    pipelines = {run.name: str(run / "pipeline") for run in options.runs} or {"AR": "tiny"}
    return [
        Model(f"{label}, {window}", pipeline, changes)
        for label, pipeline in pipelines.items()
        for window, changes in among.items()
        if window in options.models
    ]


def _cells(options: argparse.Namespace, device: torch.device, pool: Executor) -> Iterator[Row]:
    for steps in options.steps:
        for model in _models(options):
            yield _streamed_cell(options, device, pool, model, steps)
        if options.reference:
            yield _reference_cell(options, device, pool, steps)


def _streamed_cell(
    options: argparse.Namespace,
    device: torch.device,
    pool: Executor,
    model: Model,
    steps: int,
) -> Row:
    stories = draw_stories(SEED, options.videos, SHOTS, CHUNKS, 3)
    films = videos(_plan(model, device, len(stories)), stories, steps, SEED)
    return partial(_row, model.name, steps, scored(pool, films, stories))


def _reference_cell(
    options: argparse.Namespace, device: torch.device, pool: Executor, steps: int
) -> Row:
    stories = draw_stories(SEED, options.videos * SHOTS, 1, REFERENCE_CHUNKS, 3)
    overrides = (
        "model.config=null",
        "model.dtype=float32",
        f"model.checkpoint={options.reference}",
        f"geometry.batch={len(stories)}",
    )
    program = transform(open_recipe("tiny_reference", overrides))
    plan = _plan(Model("", "tiny", {}), device, len(stories))
    text = encoded(plan, stories)
    latents = sample(program, instantiate(program, device), text, steps, SEED)
    films = decoded(plan, iter(latents.split(3, dim=2)))
    return partial(_row, "bidirectional reference", steps, scored(pool, films, stories))


def _minutes(options: argparse.Namespace, device: torch.device, pool: Executor) -> Iterator[Row]:
    """Rows of single shots of 60 s: with sinks, and without."""
    for model in _models(options, SINKS) if options.minutes else ():
        yield _minutes_row(options, device, pool, model)


def _minutes_row(
    options: argparse.Namespace,
    device: torch.device,
    pool: Executor,
    model: Model,
) -> Row:
    stories = draw_stories(SEED + 1, options.minutes, 1, MINUTE, 3)
    films = videos(_plan(model, device, len(stories)), stories, 4, SEED)
    kept = lasting(pool, films)
    scores = scored(pool, films, stories)

    def row() -> dict[str, Any]:
        found = kept()
        return _row(model.name, 4, scores) | {
            "identity": found.late,
            "identity_early": found.early,
            "change": found.change,
            "over_time": found.over_time,
        }

    return row


def _plan(model: Model, device: torch.device, batch: int) -> StreamPlan:
    overrides = (
        f"stream.pipeline={model.pipeline}",
        f"geometry.batch={batch}",
        *(f"geometry.{key}={value}" for key, value in model.changes.items()),
    )
    return plan_stream(open_recipe("tiny_stream", overrides), device)


def _row(model: str, steps: int, scores: Callable[[], list[ShotScore]]) -> dict[str, Any]:
    return {"model": model, "steps": steps, **asdict(summarise(scores()))}


def _plot(curves: dict[str, list[float]]) -> str:
    """Identity against time as an SVG."""
    seconds = STRETCH / FPS
    lines = [
        Curve(name, [(seconds * (i + 1), value) for i, value in enumerate(values)], colour)
        for (name, values), colour in zip(curves.items(), COLOURS, strict=False)
    ]
    caption = "identity with the first two seconds, %, over the seconds of one shot"
    return line_plot(lines, caption, (0, 100))


if __name__ == "__main__":
    main()
