"""What ranks that train send each other in each form, and the error that it makes.

    torchrun --nproc-per-node 2 benchmarks/training_exchanges.py --device cpu

The recipe is tiny_train_sp2, from the shipped tiny weights, on clips of the tiny world.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lltk.bench.layer_errors import Errors
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.models.pipelines import find_pipeline
from lltk.ops.fp8_dequantise.reference import fp8_dequantise
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_quantise.reference import nvfp4_quantise
from lltk.parallel.mesh import Mesh, meshed
from lltk.parallel.ranks import Ranks, joined
from lltk.train.data import Batch, Dataset
from lltk.train.objective import Objective
from lltk.training import plan_training

_METHOD = """\
A step of the tiny world over {clips} clips, from the shipped weights. Loss and gradient are
relative to those of the step in which all travels in float32: the gradient by the norm of the
difference. Normal is the error of a normal tensor of 7040 tokens and 24 heads of 128 channels.
Bytes are of a value among these."""
FORMS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "compute": (4.0, lambda x: x),
    "fp8": (1 + 4 / 128, lambda x: fp8_dequantise(*fp8_quantise(x), x.dtype)),
    "nvfp4": (0.5 + 1 / 16, lambda x: nvfp4_dequantise(*nvfp4_quantise(x), x.dtype)),
}
"""Bytes a value at 128 channels a head, and what arrives."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument("--clips", type=int, default=16, help="clips of the step (default: 16)")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return [*FORMS]


def main() -> None:
    """Measure and write the record."""
    options = script_options(parser())
    with joined(options.device) as ranks:
        made = list(results(options.clips, ranks))
        if ranks.rank == 0:
            method = _METHOD.format(clips=options.clips)
            record = script_record("training_exchanges", method, made, ranks.size)
            write_record(options.output, record, text(record))


def results(clips: int, ranks: Ranks) -> Iterator[dict[str, Any]]:
    """A row for each form."""
    normal = torch.randn(1, 7040, 24, 128, generator=torch.Generator().manual_seed(0))
    dataset: Dataset | None = None
    wanted: tuple[float, Tensor] | None = None
    with meshed(ranks, ranks.size, 1) as mesh:
        for name, (size, arriving) in FORMS.items():
            changes = {"passes.balanced_sp.exchange": name, "passes.balanced_sp.size": ranks.size}
            changes |= {"model.checkpoint": find_pipeline("tiny") / "transformer"}
            changes |= {"geometry.batch": clips, "train.data.clips": clips}
            given = [f"{key}={value}" for key, value in changes.items()]
            plan = plan_training(read_recipe(find_recipe("tiny_train_sp2"), given), ranks.device)
            dataset = dataset or plan.dataset(mesh=mesh)
            batch = Batch(0, range(clips), dataset.batch(0, range(clips)))
            loss, gradient = _step(plan.objective(dataset), batch, mesh)
            wanted = wanted or (loss, gradient)
            errors = Errors()
            errors.add({"normal": arriving(normal)}, {"normal": normal})
            errors.add({"gradient": gradient}, {"gradient": wanted[1]})
            yield {
                "name": name,
                "bytes": size,
                "loss": loss,
                "loss_error": abs(loss / wanted[0] - 1),
                **errors.relative(),
            }


def _step(objective: Objective, batch: Batch, mesh: Mesh) -> tuple[float, Tensor]:
    """The loss of a step, and its gradient as one vector."""
    loss = objective.loss(batch) / objective.count(batch)
    loss.backward()
    found = [p.grad.flatten() for p in objective.module.parameters() if p.grad is not None]
    return float(mesh.total(loss.detach())), mesh.total(torch.cat(found)).cpu()


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "form": lambda row: row["name"],
        "bytes a value": column("bytes", ".2f"),
        "normal": column("normal", ".4f"),
        "gradient": column("gradient", ".4f"),
        "loss": column("loss_error", ".5f"),
    }
    return markdown(record, "Exchanges while training", columns)


if __name__ == "__main__":
    main()
