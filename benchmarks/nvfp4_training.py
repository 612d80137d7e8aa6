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
from lltk.cli.datasets import dataset_for, encoder_for
from lltk.cli.recipes import find_recipe
from lltk.cli.tasks import held_out_loss, task_of
from lltk.compiler import transform, with_weights
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import parse_recipe, read_recipe
from lltk.models import wan22
from lltk.train.data import Dataset
from lltk.train.loop import Hooks, Trainer
from lltk.train.objective import FlowMatching
from lltk.train.plot import Curve, line_plot, running_mean

HERE = Path(__file__).parent
HIGH = "high precision"
VARIANTS: dict[str, dict[str, Any] | None] = {
    HIGH: None,
    "NVFP4, RHT and SR": {},
    "NVFP4 without RHT": {"hadamard": 0},
    "NVFP4 without SR": {"stochastic": False},
}
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
        "Teacher forcing on the tiny world. For a seed all variants have the same start, clips, "
        "noise and rates. Held-out loss: of the averaged weights at the end, over clips and noise "
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
        for name, options in VARIANTS.items():
            begun = time.perf_counter()
            data = _recipe(arguments, options, seed)
            task = task_of(data, name, device)
            dataset = dataset or _dataset(data, task.section, device)
            losses, seconds, held_out = _train(data, task, dataset, device, seed)
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
    arguments: argparse.Namespace, options: dict[str, Any] | None, seed: int
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
        "train.validate_every=null",
        "train.sample_every=null",
        f"train.checkpoint_every={arguments.steps}",
        f"model.dtype={'bfloat16' if cuda else 'float32'}",
    ]
    if arguments.start:
        overrides += ["model.config=null", f"model.checkpoint={arguments.start}"]
    overrides += arguments.set
    data = read_recipe(find_recipe("tiny_train"), overrides)
    data["train"]["seed"] = seed
    if options is not None:
        steps = data["passes"]
        at = steps.index("regionalise")
        lowered = {"lower": {"nvfp4": arguments.backend}}
        data["passes"] = [*steps[:at], {"nvfp4_train": options}, "regionalise", lowered]
    return data


def _dataset(data: dict[str, Any], section: Any, device: torch.device) -> Dataset:
    """The clips of a seed, encoded once for all variants."""
    recipe = parse_recipe(data, "recipe")
    dtype = getattr(torch, recipe.model.dtype)
    encoder = encoder_for(section.data, recipe.geometry, device, dtype)
    return dataset_for(section, recipe.geometry, encoder, device)


def _train(
    data: dict[str, Any], task: Any, dataset: Dataset, device: torch.device, seed: int
) -> tuple[list[float], list[float], float]:
    """Losses and seconds of every step, and the held-out loss of the averaged weights."""
    section = task.section
    recipe = parse_recipe(data, "recipe")
    program = transform(recipe, weights=recipe.model.checkpoint is not None)
    if recipe.model.checkpoint is None:
        program = _fresh(program, seed)
    module = instantiate(program, device)
    objective = FlowMatching(
        program, module, section.image, section.context_noise, section.gap, section.graphs
    )
    losses: list[float] = []
    seconds: list[float] = []
    held: list[float] = []

    def observe(metrics: Any) -> None:
        losses.append(metrics.loss)
        seconds.append(metrics.seconds)

    def validate(step: int) -> dict[str, float]:
        held.append(held_out_loss(objective, dataset, section))
        return {"loss": held[-1]}

    section = section.model_copy(update={"validate_every": section.steps})
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            objective, dataset, section, Path(folder), task.about, Hooks(observe, validate)
        ).run()
    return losses, seconds, held[-1]


def _fresh(program: Program, seed: int) -> Program:
    """The program with the first weights of a seed."""
    torch.manual_seed(seed)
    return with_weights(program, wan22.build(program.recipe["model"]["config"]).state_dict())


if __name__ == "__main__":
    main()
