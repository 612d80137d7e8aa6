"""Time whole distillation steps of the 5B: an update of the student, and one of its critic.

    python benchmarks/distil_iteration.py
    python benchmarks/distil_iteration.py --recipe tiny_distil --pipeline tiny --device cpu

A pipeline of the true sizes with random weights is made first, unless --pipeline names a pipeline.
With --folder it stays there, and the next command finds it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lltk.bench.random_pipeline import wan22_5b_pipeline
from lltk.bench.record import Record, markdown, percentile, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.graph.memory import readable, total
from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.tasks.distillation import plan_distillation
from lltk.training import open_training

_METHOD = """\
Whole steps of {recipe}, one clip a step, through `open_training`. A step is one update of the
student (its rollout, both scores, the gradient through each chunk's last pass) and one of the fake
score (a rollout without gradients, and the score's own). Every rollout makes {passes} passes a
chunk at most, by a draw. Changed keys: {changes}. Seconds are medians of {runs} steps after one
that warms up. Peak memory is torch's, beside the estimate of `lltk distil --dry-run`. Weights and
prompts are random; sizes are the true ones."""
_ALWAYS = (
    "train.steps=1000000",
    "train.checkpoint_every=1000000",
    "train.sample_every=null",
    "geometry.batch=1",
    "train.batch=1",
    "distil.fake.updates=1",
)


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=4)
    made.add_argument("--recipe", default="wan22_5b_distil_fp8", help="(default: %(default)s)")
    made.add_argument("--pipeline", help="a pipeline to use instead of random weights")
    made.add_argument("--folder", type=Path, help="where to make weights, and find them")
    made.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return [options.recipe]


def main() -> None:
    """Measure, and write the record."""
    options = script_options(parser())
    where = nullcontext(options.folder) if options.folder else TemporaryDirectory()
    with where as made:
        row = {"name": options.recipe} | measure(options, Path(made))
    method = _METHOD.format(
        recipe=options.recipe,
        passes=max(row["steps"]),
        changes=", ".join(options.changes) or "none",
        runs=options.runs,
    )
    record = script_record("distil_iteration", method, [row])
    write_record(options.output, record, text(record))
    print(text(record))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A row's seconds, memory and losses."""
    device = torch.device(options.device)
    pipeline = options.pipeline or wan22_5b_pipeline(folder, device)
    changes = [*_ALWAYS, f"train.data.pipeline={pipeline}", f"stream.pipeline={pipeline}"]
    if options.pipeline is None:
        prompts = folder / "prompts.txt"
        prompts.write_text("a red circle moving left\na green square moving up\n")
        weights = pipeline / "transformer"
        changes += [f"train.data.prompts={prompts}", f"model.checkpoint={weights}"]
        changes.append(f"distil.real.weights={weights}")
    data = read_recipe(find_recipe(options.recipe), [*changes, *options.changes])
    plan = plan_distillation(data, device, options.recipe)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with TemporaryDirectory() as made, open_training(plan, Path(made) / "run") as run:
        every = [next(iter(run)) for _ in range(options.runs + 1)]
    seconds = [step.seconds for step in every[1:]]
    return {
        "frames": plan.program.geometry.frames,
        "steps": plan.distil.steps,
        "seconds": statistics.median(seconds),
        "p90": percentile(seconds, 0.9),
        "parts": {
            part: statistics.median(step.parts[part] for step in every[1:])
            for part in every[1].parts
        },
        "peak": torch.cuda.max_memory_allocated(device) if cuda else 0,
        "estimate": dict(plan.memory),
        "memory": dict(every[0].memory),
        "implementations": dict(plan.program.implementations),
        "losses": [dict(step.losses) | {"student": step.loss} for step in every],
        "every": seconds,
    }


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "recipe": lambda row: row["name"],
        "latent frames": column("frames", "d"),
        "seconds (p90)": lambda row: f"{row['seconds']:.2f} ({row['p90']:.2f})",
        "seconds by part": lambda row: ", ".join(
            f"{part} {seconds:.2f}" for part, seconds in row["parts"].items()
        ),
        "peak memory": lambda row: readable(row["peak"]) if row["peak"] else "–",
        "estimate": lambda row: readable(total(row["estimate"])),
        "estimate by owner": lambda row: ", ".join(
            f"{owner} {readable(size)}" for owner, size in row["estimate"].items()
        ),
        "losses": lambda row: "; ".join(
            ", ".join(f"{name} {loss:.4f}" for name, loss in step.items()) for step in row["losses"]
        ),
    }
    return markdown(record, "Distillation steps of the 5B", columns)


if __name__ == "__main__":
    main()
