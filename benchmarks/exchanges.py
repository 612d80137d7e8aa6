"""What ranks send each other in each form, and the error that it makes.

    torchrun --nproc-per-node 2 benchmarks/exchanges.py
    torchrun --nproc-per-node 2 benchmarks/exchanges.py RECIPE --device cpu --set geometry.height=64

A recipe's own forms do not matter. Weights are random, and the same for every form.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lltk.bench.layer_errors import OUTPUT, Errors, watched
from lltk.bench.random_weights import with_random_weights
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.compiler import transform
from lltk.graph.memory import readable
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.parallel.ranks import joined
from lltk.stream.rollout import Rollout
from lltk.streaming.traffic import pcie_seconds, sent_bytes

_METHOD = """\
Sent is what each rank sends to the others in a denoising pass; as much arrives. PCIe ms is a model:
these bytes over the 31.5 GB/s each way of PCIe Gen4 x16, with nothing that hides or slows them.
Error is that of a denoising pass over a full cache, and of each block's result in it, relative to
the pass in which all travels in the compute dtype; each form reads a cache that it wrote itself."""
FORMS = {
    "compute": ("compute", "compute"),
    "keys and values in FP8": ("fp8", "compute"),
    "keys and values in NVFP4": ("nvfp4", "compute"),
    "queries and results in FP8": ("compute", "fp8"),
    "all in FP8": ("fp8", "fp8"),
    "keys and values in NVFP4, the rest in FP8": ("nvfp4", "fp8"),
}
"""How keys and values travel, and how queries and results do. The first rounds nothing."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument("recipe", nargs="?", default="wan22_5b_stream_sp2", metavar="RECIPE")
    made.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return [*FORMS]


def main() -> None:
    """Measure, and write the record again after each row."""
    options = script_options(parser())
    made = []
    with joined(options.device) as ranks:
        for result in results(options.recipe, options.changes, ranks.device):
            made.append(result)
            if ranks.rank == 0:
                print(result, flush=True)
                record = script_record("exchanges", _METHOD, made, ranks.size)
                write_record(options.output, record, text(record))


def results(recipe: str, changes: list[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each form."""
    wanted = None
    for name, (keys, queries) in FORMS.items():
        forms = f"exchange={keys}", f"exchange_queries={queries}"
        own = [*changes, *(f"passes.ulysses_stream.{form}" for form in forms)]
        program = transform(open_recipe(recipe, own), weights=False)
        found = _outputs(with_random_weights(program, device), device)
        wanted = wanted or found
        errors = Errors()
        errors.add(found, wanted)
        sent = sent_bytes(program)
        pcie = pcie_seconds(sent) * 1e3
        yield {"name": name, "sent_bytes": sent, "pcie_ms": pcie, "errors": errors.relative()}


@torch.no_grad()
def _outputs(program: Program, device: torch.device) -> dict[str, Tensor]:
    """What every block and the model give in a pass over a full cache; on the CPU."""
    geometry, spec = program.geometry, program.spec
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(program.dtype)

    shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
    module = instantiate(program, device)
    run = Rollout(program, module)
    run.set_text(normal(1, geometry.text_tokens, spec.text_dim))
    positions = torch.arange(geometry.chunk, dtype=torch.float64, device=device)
    for chunk in range(geometry.pages):
        run.commit(normal(*shape), positions + chunk * geometry.chunk)
    level = torch.full((1, geometry.chunk), 700.0, device=device)
    with watched(module) as seen:
        output = run.step(normal(*shape), level, positions + geometry.pages * geometry.chunk)
    return {name: value.float().cpu() for name, value in {**seen, OUTPUT: output}.items()}


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "form": lambda row: row["name"],
        "sent": lambda row: readable(row["sent_bytes"]),
        "PCIe ms": lambda row: f"{row['pcie_ms']:.1f}",
        "error": lambda row: f"{row['errors'][OUTPUT]:.4f}",
        "of a block, at most": lambda row: f"{max(row['errors'].values()):.4f}",
    }
    return markdown(record, "Exchanges", columns)


if __name__ == "__main__":
    main()
