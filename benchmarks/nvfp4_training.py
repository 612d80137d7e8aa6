"""Compare training in NVFP4 with training in high precision, from one start, over several seeds.

    python benchmarks/nvfp4_training.py --backend triton --start runs/reference/transformer

The losses over the steps are plotted beside the record.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import beside_record, column, script_options, script_parser, script_record
from lltk.files.writing import write_text
from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.train.data import Dataset
from lltk.train.metrics import last_tenth
from lltk.train.plot import Curve, line_plot, running_mean
from lltk.training import TrainingPlan, open_training, plan_training

_METHOD = """\
Teacher forcing on the tiny world. NVFP4 converts the linears that the recipe tiny_train_nvfp4
converts; {backend} runs its ops. With one seed all variants have the same start, clips, noise and
learning rates. The held-out loss is that of the averaged weights at the end, over clips and noise
that are the same for all."""
PLOT = ".svg"
HIGH = "high precision"
VARIANTS: dict[str, tuple[str, ...] | None] = {
    HIGH: None,
    "NVFP4, RHT and SR": (),
    "NVFP4 without RHT": ("passes.nvfp4_train.hadamard=0",),
    "NVFP4 without SR": ("passes.nvfp4_train.stochastic=false",),
}
"""Each variant's changes to tiny_train_nvfp4; None is tiny_train itself."""
COLOURS = ("#000", "#06c", "#c40", "#294")


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument("--start", help="weights to begin with (default: random ones of the seed)")
    made.add_argument("--backend", default="reference", help="what runs NVFP4's ops")
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--clips", type=int, default=4096)
    made.add_argument("--set", action="append", default=[], help="override a key of the recipe")
    return made


def rows(options: argparse.Namespace) -> list[tuple[str, int]]:
    """The variant and the seed of each row that a command makes."""
    return [(name, seed) for seed in range(options.seeds) for name in VARIANTS]


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "variant": lambda row: row["variant"],
        "seed": column("seed", "d"),
        "steps": column("steps", "d"),
        "last tenth's loss": column("last", ".4f"),
        "held-out loss": column("held_out", ".4f"),
        "above high precision %": column("above_high", "+.2f"),
        "ms a step": column("milliseconds", ".0f"),
    }
    return markdown(record, "Training in NVFP4", columns)


def main() -> None:
    """Train every variant with every seed and write the record."""
    options = script_options(parser(), PLOT)
    curves: dict[str, list[list[float]]] = defaultdict(list)
    results = list(_runs(options, curves))
    base = {row["seed"]: row["held_out"] for row in results if row["variant"] == HIGH}
    for row in results:
        row["above_high"] = 100 * (row["held_out"] / base[row["seed"]] - 1)
    record = script_record("nvfp4_training", _METHOD.format(backend=options.backend), results)
    write_record(options.output, record, text(record))
    lines = [
        Curve(name, list(enumerate(map(fmean, zip(*runs, strict=True)))), colour)
        for (name, runs), colour in zip(curves.items(), COLOURS, strict=True)
    ]
    caption = f"running mean of the loss over steps, mean of {options.seeds} seeds"
    write_text(beside_record(options.output, PLOT), line_plot(lines, caption))


def _runs(
    options: argparse.Namespace, curves: dict[str, list[list[float]]]
) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    for seed in range(options.seeds):
        dataset = None
        for name, changes in VARIANTS.items():
            begun = time.perf_counter()
            plan = plan_training(_recipe(options, changes, seed), device, name)
            dataset = dataset or plan.dataset()
            losses, seconds, held_out = _train(plan, dataset)
            curves[name].append(running_mean(losses))
            row = {
                "variant": name,
                "seed": seed,
                "steps": options.steps,
                "last": fmean(last_tenth(losses)),
                "held_out": held_out,
                "milliseconds": 1000 * sorted(seconds)[len(seconds) // 2],
                "seconds": time.perf_counter() - begun,
            }
            print(json.dumps(row), flush=True)
            yield row


def _recipe(
    options: argparse.Namespace, changes: tuple[str, ...] | None, seed: int
) -> dict[str, Any]:
    cuda = options.device.startswith("cuda")
    graphs = cuda and options.backend != "reference"  # which makes its tables at every call
    overrides = [
        f"geometry.batch={options.batch}",
        f"train.batch={options.batch}",
        f"train.steps={options.steps}",
        f"train.warmup={max(1, options.steps // 10)}",
        f"train.ema_start={options.steps // 2}",
        "train.ema_decay=0.98",
        f"train.data.clips={options.clips}",
        f"train.graphs={'true' if graphs else 'false'}",
        f"train.validate_every={options.steps}",
        "train.sample_every=null",
        "train.context_error=0",
        f"train.checkpoint_every={options.steps}",
        f"model.dtype={'bfloat16' if cuda else 'float32'}",
    ]
    if options.start:
        overrides += ["model.config=null", f"model.checkpoint={options.start}"]
    name = "tiny_train"
    if changes is not None:
        name = "tiny_train_nvfp4"
        if options.backend != "reference":
            overrides.append(f"passes.lower.prefer={[*dict.fromkeys((options.backend, 'triton'))]}")
        overrides += changes
    data = read_recipe(find_recipe(name), [*overrides, *options.set])
    data["train"]["seed"] = seed
    return data


def _train(plan: TrainingPlan, dataset: Dataset) -> tuple[list[float], list[float], float]:
    """Losses and seconds of every step, and the held-out loss of the averaged weights."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_training(plan, Path(folder), dataset=dataset) as run,
    ):
        steps = list(run)
    return [m.loss for m in steps], [m.seconds for m in steps], steps[-1].validation["loss"]


if __name__ == "__main__":
    main()
