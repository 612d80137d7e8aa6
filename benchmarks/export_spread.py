"""Compare steps in W4A4 in ONNX Runtime with torch's by their distribution.

One flipped rounding spreads through a whole step. So ONNX Runtime's distance from torch is set
beside the distance of torch from itself where latents have a millionth of noise. Where nothing
flips, the same graph is as near as float32 is; one that is a little wrong never is.

python benchmarks/export_spread.py
python benchmarks/export_spread.py --runs 100
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lltk.bench.record import Record, markdown, percentile, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.export.bundle import emit
from lltk.export.golden import places, run_external
from lltk.exporting import ExportPlan, plan_export
from lltk.files.writing import whole_folder
from lltk.graph.contract import Role
from lltk.graph.module import instantiate
from lltk.graph.recipe import open_recipe
from lltk.stream.runtimes.onnx_graph import OnnxGraph

RECIPES = ("tiny_stream_w4a4", "tiny_stream_nvfp4")
NOISE = 1e-6
FLIPPED = 1e-5
"""A distance above it comes from a rounding that flipped."""


def measure(recipe: str, draws: int) -> dict[str, Any]:
    """Distances of a step, over torch's own pages, for a number of latents."""
    plan = plan_export(open_recipe(recipe), text="reference")
    pool, models = emit(plan.transformer)
    with TemporaryDirectory() as place:
        folder = Path(place) / "models"
        with whole_folder(folder) as new:
            pool.write(new, "transformer", models)
        session = OnnxGraph(folder / "transformer" / "step.onnx")
        pairs = list(distances(plan, session, draws))
    onnx, own = (sorted(each) for each in zip(*pairs, strict=True))
    return {"recipe": recipe, "onnx_runtime": onnx, "torch": own}


@torch.no_grad()
def distances(
    plan: ExportPlan, step: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], draws: int
) -> Iterator[tuple[float, float]]:
    """For each draw, how far a step is from torch's, and how far torch's is under noise.

    Distances are norms of differences, relative to the norm of torch's result.

    Args:
        plan: with weights.
        step: the step to compare.
        draws: how many.
    """
    program, draw = plan.reference, torch.Generator().manual_seed(0)
    module, contract = instantiate(program), plan.transformer.contract("step")
    normal = partial(torch.randn, generator=draw)
    text = program.contract("prologue").input(Role.TEXT).shape
    given = dict(module("prologue", program.contract("prologue").named({Role.TEXT: normal(text)})))
    given |= {name: torch.zeros(s.shape, dtype=s.dtype) for name, s in program.pages.items()}
    latents = contract.input(Role.LATENTS).shape
    last = program.geometry.pages - 1
    own = program.contract("commit")
    for slot in range(last):
        here = own.named(
            {Role.LATENTS: normal(latents), **places(program, range(slot), slot, slot)}
        )
        module("commit", {name: {**given, **here}[name] for name in own.inputs})
    here = places(program, range(last), last, last)
    reference = partial(run_external, partial(module, "step"), program.contract("step"), here=here)
    for _ in range(draws):
        time = 1000 * torch.rand(contract.input(Role.TIME).shape, generator=draw)
        drawn = {Role.LATENTS: normal(latents), Role.TIME: time, **here}
        x = {name: {**given, **contract.named(drawn)}[name] for name in contract.inputs}
        noisy = dict(x)
        noisy[contract.name(Role.LATENTS)] = drawn[Role.LATENTS] * (1 + NOISE * normal(latents))
        wanted, *others = (
            made[program.spec.output]
            for made in (reference(inputs=x), step(x), reference(inputs=noisy))
        )
        onnx, torchs = (float((other - wanted).norm() / wanted.norm()) for other in others)
        yield onnx, torchs


def within(row: Mapping[str, Any]) -> bool:
    """Whether ONNX Runtime's distances are no larger than torch's, as distributions.

    Two things are asked for. By Kolmogorov's and Smirnov's one-sided test, at one in a hundred,
    they are not larger. It is one-sided because noise on the latents lets torch be farther from
    itself than ONNX Runtime is where nothing flips: smaller distances count as within. That test
    does not see a graph that is a little wrong, whose distances lie among those of flipped
    roundings. So if nothing flipped in some of torch's draws, nothing did in some of ONNX
    Runtime's: a graph with the scale of one block of a weight doubled has no such draw.
    """
    ours, theirs = row["onnx_runtime"], row["torch"]
    if min(ours) > FLIPPED >= min(theirs):
        return False
    apart = max(
        sum(v <= at for v in theirs) / len(theirs) - sum(v <= at for v in ours) / len(ours)
        for at in (*ours, *theirs)
    )
    return bool(apart <= 1.52 * (1 / len(ours) + 1 / len(theirs)) ** 0.5)


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    return script_parser(__file__, __doc__, runs=40, device=False)


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return list(RECIPES)


def main() -> None:
    """Measure every recipe and write the record."""
    options = script_options(parser())
    method = f"""
        Steps of {options.runs} random latents with the shipped weights, over pages that torch
        committed. Distances are norms of differences, relative to the norm of torch's result: of
        ONNX Runtime's step, and of torch's with noise of {NOISE:g} on the latents. Above
        {FLIPPED:g} a rounding flipped. ONNX Runtime is within torch's spread if
        Kolmogorov's and Smirnov's one-sided test does not find its distances larger, at one in a
        hundred, and if there are draws in which nothing flipped, as there are of torch's.
        """
    results = [measure(recipe, options.runs) for recipe in rows(options)]
    record = script_record("export_spread", method, results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown: a row for each of the two distributions of a recipe."""

    def shown(distances: list[float]) -> str:
        flipped = sum(each > FLIPPED for each in distances) / len(distances)
        levels = " / ".join(f"{percentile(distances, at):.1e}" for at in (0.1, 0.5, 0.9, 1))
        return f"{levels}; {flipped:.0%} flipped"

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "recipe": lambda row: row["recipe"],
        "ONNX Runtime: 10 % / median / 90 % / largest": lambda row: shown(row["onnx_runtime"]),
        "torch under noise": lambda row: shown(row["torch"]),
        "within": lambda row: "yes" if within(row) else "no",
    }
    return markdown(record, "Steps in W4A4 in ONNX Runtime", columns)


if __name__ == "__main__":
    main()
