"""Prompt agreement and identity of the tiny world's models.

    .venv/bin/python benchmarks/quality.py --pipeline tiny --reference RUN/transformer \
        --device cuda --videos 336

Writes quality.json and quality.md beside this file (or to --output), and identity.svg.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
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
    summarise,
    videos,
)
from lltk.bench.quality import PARTS, STRETCH, ShotScore, draw_stories
from lltk.bench.record import Record, make_record, markdown, markdown_table, write_record
from lltk.compiler import transform
from lltk.graph.module import instantiate
from lltk.graph.recipe import open_recipe
from lltk.models.tiny.world import FPS
from lltk.streaming import StreamPlan, plan_stream
from lltk.train.plot import Curve, line_plot
from lltk.train.sampling import sample

HERE = Path(__file__).parent
SEED = 20_000
SHOTS = 3
CHUNKS = 6
"""Of a shot, 4.5 s."""
REFERENCE_CHUNKS = 5
MINUTE = 80
"""Chunks."""
SINKS = {"window with both sinks": {}, "window without sinks": {"sink": 0}}
FULL = {"full window": {"window": 3 * SHOTS * CHUNKS}}
Row = Callable[[], dict[str, Any]]
"""Waits for a row's scores, and gives the row."""


def main() -> None:
    """Measure every cell and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="tiny")
    parser.add_argument("--reference", help="the bidirectional model's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--videos", type=int, default=336, help=f"of {SHOTS} shots, a cell")
    parser.add_argument("--minutes", type=int, default=64, help="single shots of 60 s")
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 50])
    parser.add_argument("--models", nargs="*", default=[*FULL, *SINKS], choices=[*FULL, *SINKS])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--output", type=Path, default=HERE / "quality")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(
        arguments.workers, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        record = make_record(
            "quality",
            " ".join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
            "Captions drawn with a fixed seed, none of them trained on. Agreement: share of shots "
            "whose shape, colour, motion and background are all as the caption has them, with "
            "Wilson's 95 % interval; identity: size, accent and tint of a shot's last two seconds "
            "against its first two, per cent, with the 95 % interval of the mean.",
            _results(arguments, pool),
        )
    write_record(arguments.output, record, text_of(record))
    curves = {row["model"]: row["over_time"] for row in record.results if "over_time" in row}
    if curves:
        path = arguments.output.with_name("identity.svg")
        path.write_text(_plot(curves), encoding="utf-8")


def text_of(record: Record) -> str:
    """The cells, and a table of their own for shots of 60 s."""
    cells = [row for row in record.results if "over_time" not in row]
    long = [row for row in record.results if "over_time" in row]
    text = markdown(
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
    return "\n".join([text, *markdown_table(headings, lines)]) + "\n" if long else text


def _part(part: str, row: Mapping[str, Any]) -> str:
    return interval(row["parts"][part])


def _results(arguments: argparse.Namespace, pool: Executor) -> Iterator[dict[str, Any]]:
    device = torch.device(arguments.device)
    rows = itertools.chain(_cells(arguments, device, pool), _minutes(arguments, device, pool))
    for row in one_ahead(rows):
        found = row()
        print(json.dumps(found)[:600], flush=True)
        yield found


def _cells(arguments: argparse.Namespace, device: torch.device, pool: Executor) -> Iterator[Row]:
    for steps in arguments.steps:
        for name, changes in (FULL | SINKS).items():
            if name not in arguments.models:
                continue
            yield _streamed_cell(arguments, device, pool, name, changes, steps)
        if arguments.reference:
            yield _reference_cell(arguments, device, pool, steps)


def _streamed_cell(
    arguments: argparse.Namespace,
    device: torch.device,
    pool: Executor,
    name: str,
    changes: dict[str, int],
    steps: int,
) -> Row:
    stories = draw_stories(SEED, arguments.videos, SHOTS, CHUNKS, 3)
    plan = _plan(arguments, device, len(stories), changes)
    films = videos(plan, stories, steps, SEED)
    return partial(_row, f"AR, {name}", steps, scored(pool, films, stories))


def _reference_cell(
    arguments: argparse.Namespace, device: torch.device, pool: Executor, steps: int
) -> Row:
    stories = draw_stories(SEED, arguments.videos * SHOTS, 1, REFERENCE_CHUNKS, 3)
    overrides = (
        "model.config=null",
        "model.dtype=float32",
        f"model.checkpoint={arguments.reference}",
        f"geometry.batch={len(stories)}",
    )
    program = transform(open_recipe("tiny_reference", overrides))
    plan = _plan(arguments, device, len(stories), {})
    text = encoded(plan, stories)
    latents = sample(program, instantiate(program, device), text, steps, SEED)
    films = decoded(plan, iter(latents.split(3, dim=2)))
    return partial(_row, "bidirectional reference", steps, scored(pool, films, stories))


def _minutes(arguments: argparse.Namespace, device: torch.device, pool: Executor) -> Iterator[Row]:
    """Single shots of a minute; their identity over time is one row a setting."""
    for name, changes in SINKS.items():
        if name in arguments.models and arguments.minutes:
            yield _minutes_row(arguments, device, pool, name, changes)


def _minutes_row(
    arguments: argparse.Namespace,
    device: torch.device,
    pool: Executor,
    name: str,
    changes: dict[str, int],
) -> Row:
    stories = draw_stories(SEED + 1, arguments.minutes, 1, MINUTE, 3)
    films = videos(_plan(arguments, device, len(stories), changes), stories, 4, SEED)
    kept = lasting(pool, films)
    scores = scored(pool, films, stories)

    def row() -> dict[str, Any]:
        found = kept()
        return _row(f"AR, {name}", 4, scores) | {
            "identity": found.late,
            "identity_early": found.early,
            "change": found.change,
            "over_time": found.over_time,
        }

    return row


def _plan(
    arguments: argparse.Namespace, device: torch.device, batch: int, changes: dict[str, int]
) -> StreamPlan:
    overrides = (
        f"stream.pipeline={arguments.pipeline}",
        f"geometry.batch={batch}",
        *(f"geometry.{key}={value}" for key, value in changes.items()),
    )
    return plan_stream(open_recipe("tiny_stream", overrides), device)


def _row(model: str, steps: int, scores: Callable[[], list[ShotScore]]) -> dict[str, Any]:
    return {"model": model, "steps": steps, **asdict(summarise(scores()))}


def _plot(curves: dict[str, list[float]]) -> str:
    """Identity against time as an SVG."""
    seconds = STRETCH / FPS
    lines = [
        Curve(name, [(seconds * (i + 1), value) for i, value in enumerate(values)], colour)
        for (name, values), colour in zip(curves.items(), ("#036", "#c40"), strict=False)
    ]
    caption = "identity with the first two seconds, %, over the seconds of one shot"
    return line_plot(lines, caption, (0, 100))


if __name__ == "__main__":
    main()
