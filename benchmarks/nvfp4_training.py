"""Training in NVFP4 against high precision: loss curves from one start, over several seeds.

    .venv/bin/python benchmarks/nvfp4_training.py --device cuda --start RUN/transformer

Writes nvfp4_training.json, .md and .svg beside this file (or to --output).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lltk.bench.record import make_record, markdown, write_record
from lltk.cli.tasks import Task, held_out_loss, task_of
from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.train.data import Dataset
from lltk.train.loop import Hooks, Trainer
from lltk.train.plot import Curve, line_plot, running_mean

HERE = Path(__file__).parent
HIGH = "high precision"
VARIANTS: dict[str, tuple[str, ...] | None] = {
    HIGH: None,
    "NVFP4, RHT and SR": (),
    "NVFP4 without RHT": ("passes.nvfp4_train.hadamard=0",),
    "NVFP4 without SR": ("passes.nvfp4_train.stochastic=false",),
}
"""What each changes of tiny_train_nvfp4; high precision is tiny_train."""
COLOURS = ("#000", "#06c", "#c40", "#294")


def main() -> None:
    """Train every variant with every seed and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", help="weights all begin with; by default fresh ones of a seed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="reference", help="of NVFP4's ops")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=HERE / "nvfp4_training")
    parser.add_argument("--set", action="append", default=[], help="override a key of the recipe")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[float]]] = defaultdict(list)
    rows = list(_runs(arguments, curves))
    base = {row["seed"]: row["held_out"] for row in rows if row["variant"] == HIGH}
    for row in rows:
        row["above_high"] = 100 * (row["held_out"] / base[row["seed"]] - 1)
    record = make_record(
        "nvfp4_training",
        " ".join(["python", "benchmarks/nvfp4_training.py", *sys.argv[1:]]),
        "Teacher forcing on the tiny world, linears converted as the recipe tiny_train_nvfp4 has "
        f"them, by {arguments.backend}. For a seed all variants have the same start, clips, noise "
        "and rates. Held-out loss: of the averaged weights at the end, over clips and noise "
        "that are the same for all.",
        rows,
    )
    text = markdown(
        record,
        "Training in NVFP4",
        {
            "variant": lambda row: row["variant"],
            "seed": lambda row: str(row["seed"]),
            "steps": lambda row: str(row["steps"]),
            "last tenth's loss": lambda row: f"{row['last']:.4f}",
            "held-out loss": lambda row: f"{row['held_out']:.4f}",
            "above high precision %": lambda row: f"{row['above_high']:+.2f}",
            "ms a step": lambda row: f"{row['milliseconds']:.0f}",
        },
    )
    write_record(arguments.output, record, text)
    lines = [
        Curve(name, list(enumerate(map(fmean, zip(*runs, strict=True)))), colour)
        for (name, runs), colour in zip(curves.items(), COLOURS, strict=True)
    ]
    caption = f"running mean of the loss over steps, mean of {arguments.seeds} seeds"
    plot = arguments.output.with_name(arguments.output.name + ".svg")
    plot.write_text(line_plot(lines, caption), encoding="utf-8")


def _runs(
    arguments: argparse.Namespace, curves: dict[str, list[list[float]]]
) -> Iterator[dict[str, Any]]:
    device = torch.device(arguments.device)
    for seed in range(arguments.seeds):
        dataset = None
        for name, changes in VARIANTS.items():
            begun = time.perf_counter()
            task = task_of(_recipe(arguments, changes, seed), name, device)
            dataset = dataset or task.dataset()
            losses, seconds, held_out = _train(task, dataset)
            curves[name].append(running_mean(losses))
            row = {
                "variant": name,
                "seed": seed,
                "steps": arguments.steps,
                "last": fmean(losses[-max(1, len(losses) // 10) :]),
                "held_out": held_out,
                "milliseconds": 1000 * sorted(seconds)[len(seconds) // 2],
                "seconds": time.perf_counter() - begun,
            }
            print(json.dumps(row), flush=True)
            yield row


def _recipe(
    arguments: argparse.Namespace, changes: tuple[str, ...] | None, seed: int
) -> dict[str, Any]:
    cuda = arguments.device.startswith("cuda")
    graphs = cuda and arguments.backend != "reference"  # which makes its tables at every call
    overrides = [
        f"geometry.batch={arguments.batch}",
        f"train.batch={arguments.batch}",
        f"train.steps={arguments.steps}",
        f"train.warmup={max(1, arguments.steps // 10)}",
        f"train.ema_start={arguments.steps // 2}",
        "train.ema_decay=0.98",
        f"train.data.clips={arguments.clips}",
        f"train.graphs={'true' if graphs else 'false'}",
        f"train.validate_every={arguments.steps}",
        "train.sample_every=null",
        "train.context_error=0",
        f"train.checkpoint_every={arguments.steps}",
        f"model.dtype={'bfloat16' if cuda else 'float32'}",
    ]
    if arguments.start:
        overrides += ["model.config=null", f"model.checkpoint={arguments.start}"]
    name = "tiny_train"
    if changes is not None:
        name = "tiny_train_nvfp4"
        overrides += [f"passes.lower.nvfp4={arguments.backend}", *changes]
    data = read_recipe(find_recipe(name), [*overrides, *arguments.set])
    data["train"]["seed"] = seed
    return data


def _train(task: Task, dataset: Dataset) -> tuple[list[float], list[float], float]:
    """Losses and seconds of every step, and the held-out loss of the averaged weights."""
    objective = task.objective()
    losses: list[float] = []
    seconds: list[float] = []
    held: list[float] = []

    def observe(metrics: Any) -> None:
        losses.append(metrics.loss)
        seconds.append(metrics.seconds)

    def validate(step: int) -> dict[str, float]:
        held.append(held_out_loss(objective, dataset, task.section))
        return {"loss": held[-1]}

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            objective, dataset, task.section, Path(folder), task.about, Hooks(observe, validate)
        ).run()
    return losses, seconds, held[-1]


if __name__ == "__main__":
    main()
