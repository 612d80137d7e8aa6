"""Take the tiny world from random weights to few steps, and measure what comes of it.

    python benchmarks/tiny_pipeline.py --minutes 9
    python benchmarks/tiny_pipeline.py --device cpu --share 0.01 --videos 2 --folder runs/smoke

The stages are commands of lltk: a bidirectional reference, a causal model in NVFP4 that begins with
it, a score that begins with that one, and the causal model distilled. After --minutes the script
ends with exit code 3, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lltk.bench.agreement import interval, one_ahead, scored, scorers, summarise, videos
from lltk.bench.quality import DISTANCES, draw_stories
from lltk.bench.record import Record, markdown, markdown_table, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.files.writing import write_text
from lltk.graph.recipe import open_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.streaming import plan_stream
from lltk.train.loop import METRICS
from lltk.train.metrics import last_tenth, read_metrics

_METHOD = """\
Seconds of a stage are those of its commands, from their start to their end, with everything that
they load, encode and compile; a stage that was interrupted has several. The loss is the mean over
the last tenth of the steps. Captions are drawn with a fixed seed; no model was trained on them.
Agreement, identity and frame distances are as in the record of distillation, for the causal model
of this run in many steps, and in few with the distilled adapter."""
AGAIN = 3
"""The exit code where the same command goes on."""
SEED, SHOTS, CHUNKS, CHUNK = 22_000, 3, 6, 3
MANY, SOME, FEW = 50, 4, 2
REFERENCE, CAUSAL, SCORE, DISTILLED = "reference", "causal", "score", "distilled"
RESULTS = ((CAUSAL, MANY), (CAUSAL, SOME), (DISTILLED, SOME), (DISTILLED, FEW))
"""The stage and the steps of each result."""


@dataclass(frozen=True)
class Stage:
    """A command that trains.

    Attributes:
        verb: ``train`` or ``distil``.
        recipe: a shipped one's name.
        settings: of the recipe; {runs} stands for the folder of all stages.
    """

    verb: str
    recipe: str
    settings: tuple[str, ...] = ()


STAGES: Mapping[str, Stage] = {
    REFERENCE: Stage("train", "tiny_reference"),
    CAUSAL: Stage(
        "train",
        "tiny_train_nvfp4",
        ("model.config=null", "model.checkpoint={runs}/reference/transformer"),
    ),
    SCORE: Stage(
        "train",
        "tiny_score",
        ("model.config=null", "model.checkpoint={runs}/causal/transformer"),
    ),
    DISTILLED: Stage(
        "distil",
        "tiny_distil",
        (
            "stream.pipeline={runs}/causal/pipeline",
            "distil.real.weights={runs}/score/transformer",
            "distil.fake.weights={runs}/score/transformer",
        ),
    ),
}
ON_A_GPU = {
    "train": (
        "model.dtype=bfloat16",
        "geometry.batch=64",
        "train.graphs=true",
        "train.compile=true",
    ),
    "distil": ("train.graphs=true",),
}


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, default=Path("runs/tiny_pipeline"), help="of all runs")
    made.add_argument("--share", type=float, default=1.0, help="of each stage's steps and clips")
    made.add_argument("--minutes", type=float, help="after these the script ends")
    made.add_argument("--videos", type=int, default=336, help=f"of {SHOTS} shots, for a result")
    made.add_argument("--workers", type=int, default=8, help="processes that score")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return [*STAGES, *(f"{stage}, {steps} steps" for stage, steps in RESULTS)]


def main() -> None:
    """Go on with the stages; measure what came of them, and write the record."""
    options = script_options(parser())
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        _finish(options, name, stage, end)
    with scorers(options.workers) as pool:
        results = [_stage(options, name) for name in STAGES]
        results += [row() for row in one_ahead(_results(options, pool))]
    record = script_record("tiny_pipeline", _METHOD, results)
    write_record(options.output, record, text(record))
    print(text(record))


def command(options: argparse.Namespace, stage: Stage, name: str) -> list[str]:
    """A stage's command, without the program that takes it."""
    settings = [setting.format(runs=options.folder) for setting in stage.settings]
    if options.device != "cpu":
        settings += ON_A_GPU[stage.verb]
    if options.share < 1:
        recipe = read_recipe(find_recipe(stage.recipe), [])
        whole = {"train.steps": recipe["train"]["steps"]}
        whole["train.data.clips"] = recipe["train"]["data"]["clips"]
        if stage.verb == "distil":
            whole["distil.fake.lead"] = recipe["distil"]["fake"]["lead"]
        settings += [f"{key}={max(2, round(options.share * n))}" for key, n in whole.items()]
        settings.append("train.ema_start=1")
    sets = [word for setting in settings for word in ("--set", setting)]
    device = ["--device", options.device]
    output = ["-o", str(options.folder / name), "--resume"]
    return [stage.verb, stage.recipe, *output, *device, *sets]


def _finish(options: argparse.Namespace, name: str, stage: Stage, end: float | None) -> None:
    """Go on with a stage until it is at its end, or end the script when its time is over."""
    notes = options.folder / f"{name}.json"
    found = json.loads(notes.read_text()) if notes.is_file() else {"seconds": [], "done": False}
    if found["done"]:
        return
    words = command(options, stage, name)
    found["command"] = shlex.join(["lltk", *words])
    print(found["command"], flush=True)
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "lltk", *words])
    try:
        process.wait(None if end is None else max(0.0, end - begun))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
    found["seconds"].append(time.monotonic() - begun)
    found["done"] = process.returncode == 0
    write_text(notes, json.dumps(found))
    if not found["done"]:
        late = end is not None and time.monotonic() >= end
        sys.exit(AGAIN if late else f"{name}: its command failed; see its messages above")


def _stage(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The row of a stage that is at its end."""
    notes = json.loads((options.folder / f"{name}.json").read_text())
    steps = read_metrics(options.folder / name / METRICS)
    loss = fmean(step.loss for step in last_tenth(steps))
    own = {key: notes[key] for key in ("command", "seconds")}
    return {"name": name, "steps": steps[-1].step, "loss": loss, **own}


def _results(options: argparse.Namespace, pool: Executor) -> Iterator[Callable[[], dict[str, Any]]]:
    """Calls that wait for the rows of what models show."""
    for stage, steps in RESULTS:
        yield _result(options, pool, stage, steps)


def _result(
    options: argparse.Namespace, pool: Executor, stage: str, steps: int
) -> Callable[[], dict[str, Any]]:
    """Make a stage's videos, and start to score them."""
    stories = draw_stories(SEED, options.videos, SHOTS, CHUNKS, CHUNK)
    changes = [f"stream.pipeline={options.folder / CAUSAL / 'pipeline'}"]
    changes.append(f"geometry.batch={options.videos}")
    if stage == DISTILLED:
        changes.append(f"model.lora={options.folder / DISTILLED / 'lora.safetensors'}")
    plan = plan_stream(open_recipe("tiny_stream", changes), torch.device(options.device))
    scores = scored(pool, videos(plan, stories, steps, SEED), stories)
    return lambda: {"name": f"{stage}, {steps} steps", **asdict(summarise(scores()))}


def text(record: Record) -> str:
    """The record as Markdown: the stages, and what their models show."""
    stages = [row for row in record.results if "command" in row]
    results = [row for row in record.results if "command" not in row]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "stage": lambda row: row["name"],
        "steps": lambda row: str(row["steps"]),
        "seconds": lambda row: " + ".join(f"{each:.0f}" for each in row["seconds"]),
        "loss": column("loss", ".4f"),
        "command": lambda row: f"`{row['command']}`",
    }
    shown = record.model_copy(update={"results": stages})
    table = markdown(shown, "The tiny world's whole pipeline", columns)
    return "\n".join([table, *_qualities(results)]) + "\n"


def _qualities(results: Iterable[Mapping[str, Any]]) -> list[str]:
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "model": lambda row: row["name"],
        "shots": lambda row: str(row["shots"]),
        "agreement %": lambda row: interval(row["agreement"]),
        "identity %": lambda row: interval(row["identity"]),
        **{heading: lambda row, key=key: interval(row[key]) for key, heading in DISTANCES.items()},
    }
    lines = [[make(row) for make in columns.values()] for row in results]
    return markdown_table([*columns], lines)


if __name__ == "__main__":
    main()
