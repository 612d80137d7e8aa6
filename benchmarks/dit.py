"""Time the transformer's passes at a full window, and say which kernels take the time.

    python benchmarks/dit.py
    python benchmarks/dit.py wan22_5b_stream benchmarks/dit/fused.yaml --runs 10
    torchrun --nproc-per-node 2 benchmarks/dit.py wan22_5b_stream_sp2
    python benchmarks/dit.py wan22_5b_stream_sp2 --rank-of 2

With --rank-of one process makes the passes of one rank of so many: the time that a rank needs if it
never waits for another. Its exchanges are copies of as many bytes, so its errors say nothing.
Recipes are files or names of shipped recipes, all of one model. By default they are the steps from
bfloat16 to FP8 throughout. Weights are random and have the true shapes. They are the same for every
recipe, so that errors can be compared too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lltk.bench.ceiling import ceiling
from lltk.bench.layer_errors import OUTPUT, Errors, watched
from lltk.bench.profiling import launched, longest_kernels, profiled, timed, wait
from lltk.bench.random_weights import with_random_weights
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.compiler import transform
from lltk.graph.memory import readable
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, load_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.parallel.alike import alike
from lltk.parallel.ranks import joined
from lltk.stream.recipe import stream_section
from lltk.stream.rollout import Rollout

HERE = Path(__file__).parent
_METHOD = """\
Milliseconds of {runs} passes after three that warm up, with a full cache, timed by {how}. Host ms
is how long a denoising pass keeps the host, the GPU being idle when it begins. DiT FPS is a chunk's
video frames over the seconds of its denoising passes and its commit. First s is the time of the
first denoising pass and the first commit; it includes what has to be compiled and no recipe above
has compiled yet. Error is that of a denoising pass's output and of each block's, relative to the
first recipe's eager pass; each recipe reads a cache that it wrote itself. The next column is the
largest ratio, at any block or the output, of these errors to those of fp8_linears. Owners are
shares of a denoising pass's time, told apart by the names of its kernels. Products alone are the
pass's linears and its attention, each timed by itself in the same run and counted as often as the
pass makes it; the column after them is their share of the step. Weights are random and have the
true shapes."""
_OF_A_RANK = """\
One process makes the passes of one rank of {ranks}: its exchanges are copies of as many bytes, so
no rank is waited for, and errors say nothing."""
_LINEARS = "fp8_linears"
_OWNERS = {
    "element-wise, compiled": ("triton_per_", "triton_poi_", "triton_red_"),
    "decoding pages": ("decode_kernel", "decode_fp8_kernel"),
    "attention": ("sdpa", "fmha", "flash", "attention"),
    "GEMM": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "scaled_mm"),
    "communication": ("nccl",),
    "element-wise": (),
}
"""Parts of kernels' names, by owner. A kernel belongs to the first owner that fits. The names of
torch.compile's kernels hold those of other owners too, so they come first."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    between = (str(HERE / "dit" / f"{name}.yaml") for name in (_LINEARS, "fused"))
    default = ["wan22_5b_stream", *between, "wan22_5b_stream_fp8"]
    made = script_parser(__file__, __doc__, runs=20)
    made.add_argument("recipes", nargs="*", default=default, metavar="RECIPE")
    made.add_argument("--rank-of", type=int, metavar="N", help="measure one rank of N by itself")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes; the first recipe has an eager row too."""
    names = [Path(recipe).stem for recipe in options.recipes]
    return [*names[:1], *names]


def main() -> None:
    """Measure, and write the record again after each row."""
    options = script_options(parser())
    recipes = {Path(name).stem: load_recipe(find_recipe(name)) for name in options.recipes}
    how = "the wall clock" if options.device == "cpu" else "CUDA events"
    method = _METHOD.format(runs=options.runs, how=how)
    if options.rank_of:
        method = f"{method} {_OF_A_RANK.format(ranks=options.rank_of)}"
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(options.device))
        if options.rank_of:
            stack.enter_context(alike(options.rank_of))
        for result in _results(recipes, ranks.device, options.runs):
            results.append(result)
            if ranks.rank == 0:
                record = script_record("dit", method, results, ranks.size)
                write_record(options.output, record, text(record))


def _results(
    recipes: Mapping[str, Recipe], device: torch.device, runs: int
) -> Iterator[dict[str, Any]]:
    reference = None
    for name, recipe in recipes.items():
        for row, outputs in _rows(recipe, device, runs, reference is None):
            reference = outputs if reference is None else reference
            errors = Errors()
            errors.add(outputs, reference)
            result = {"name": name, **row, "errors": errors.relative()}
            print(result, flush=True)
            yield result


def text(record: Record) -> str:
    """The record as Markdown."""
    results = record.results
    linears = next((row["errors"] for row in results if row["name"] == _LINEARS), {})

    def more(row: Mapping[str, Any]) -> str:
        errors = row["errors"]
        if not any(linears.values()):  # none, or what all are compared with
            return "–"
        return f"{max(errors[at] / linears[at] for at in errors):.2f}"

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "recipe": lambda row: row["name"],
        "blocks": lambda row: "compiled" if row["compiled"] else "eager",
        "CUDA graphs": lambda row: "yes" if row["graphs"] else "no",
        "step ms": lambda row: f"{row['step']['median_ms']:.1f}",
        "p90": lambda row: f"{row['step']['p90_ms']:.1f}",
        "products alone ms": lambda row: _alone(row, ".1f"),
        "of the step": lambda row: _alone(row, ".0%", row["step"]["median_ms"]),
        "host ms": lambda row: f"{row['host']['median_ms']:.1f}" if "host" in row else "–",
        "commit ms": lambda row: f"{row['commit']['median_ms']:.1f}",
        "DiT FPS, 4 steps": lambda row: f"{row['dit_fps']['4']:.1f}",
        "2 steps": lambda row: f"{row['dit_fps']['2']:.1f}",
        "first s": lambda row: f"{row['first_seconds']:.1f}",
        "peak memory": lambda row: readable(row["peak_bytes"]),
        "error": lambda row: f"{row['errors'][OUTPUT]:.4f}",
        "of a block, at most": lambda row: f"{max(row['errors'].values()):.4f}",
        "over FP8 linears', at most": more,
        "owners": lambda row: ", ".join(f"{k} {v:.0%}" for k, v in row["owners"].items()) or "–",
        "ran": lambda row: ", ".join(f"{op} {how}" for op, how in row["ran"].items()),
    }
    return markdown(record, "Transformer passes", columns)


def _alone(row: Mapping[str, Any], form: str, of: float = 1.0) -> str:
    """Milliseconds of a pass's products, divided by ``of``; a dash where they were not timed."""
    parts = row["ceiling"]
    return "–" if parts is None else format(sum(p["ms"] for p in parts.values()) / of, form)


def _rows(
    recipe: Recipe, device: torch.device, runs: int, eager: bool
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """A recipe's result and what its blocks give, run as the recipe says.

    With ``eager`` a row comes first in which nothing is compiled or recorded.
    """
    program = with_random_weights(transform(recipe, weights=False), device)
    module = instantiate(program, device)
    section = stream_section(recipe.stream, "recipe")
    frames = program.geometry.chunk * program.spec.stride[0]
    alone = ceiling(program, "step", device, runs)
    for as_said in (False, True) if eager else (True,):
        compiled, graphs = as_said and section.compile, as_said and section.cuda_graphs
        if compiled:
            module.compile_blocks()
        with torch.no_grad():
            row = _measured(program, module, graphs, device, runs)
            outputs = _outputs(program, module, device)
        row |= {"compiled": compiled, "graphs": graphs, "ceiling": alone}
        step, commit = row["step"]["median_ms"], row["commit"]["median_ms"]
        fps = {str(n): frames / (n * step + commit) * 1e3 for n in (4, 2)}
        ran = dict(program.implementations)
        yield {**row, "dit_fps": fps, "ran": ran}, outputs


class Passes:
    """A denoising pass and a commit; their inputs are the same for every recipe.

    `benchmarks/step/side.py` makes them over older checkouts too.
    """

    def __init__(
        self, program: Program, module: ProgramModule, device: torch.device, graphs: bool
    ) -> None:
        geometry, spec = program.geometry, program.spec
        self._generator = torch.Generator(device).manual_seed(1)
        self._device, self._dtype = device, program.dtype
        self._shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
        self._latents = self._normal(*self._shape)
        self._level = torch.full((1, geometry.chunk), 700.0, device=device)
        self._positions = torch.arange(geometry.chunk, dtype=torch.float64, device=device)
        self._pages = geometry.pages
        self._run = Rollout(program, module, graphs)
        self._run.set_text(self._normal(1, geometry.text_tokens, spec.text_dim))

    def _normal(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self._generator, device=self._device)
        return values.to(self._dtype)

    def step(self) -> Tensor:
        return self._run.step(self._latents, self._level, self._positions)

    def commit(self) -> None:
        self._run.commit(self._latents, self._positions)

    def fill(self) -> None:
        """Commit chunks until the window is full."""
        for _ in range(self._pages):
            self._run.commit(self._normal(*self._shape), self._positions)


def _measured(
    program: Program, module: ProgramModule, graphs: bool, device: torch.device, runs: int
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    passes = Passes(program, module, device, graphs)
    begun = time.perf_counter()
    passes.step()
    passes.commit()
    wait(device)
    first = time.perf_counter() - begun
    passes.fill()
    row: dict[str, Any] = {"step": timed(passes.step, device, runs)}
    row["host"] = launched(passes.step, device, runs)
    row["owners"], found = profiled(passes.step, device, _OWNERS)
    row["kernels"] = [] if found is None else longest_kernels(found)
    row["commit"] = timed(passes.commit, device, runs)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {**row, "first_seconds": first, "peak_bytes": peak}


def _outputs(program: Program, module: ProgramModule, device: torch.device) -> dict[str, Tensor]:
    """What every block and the model give: float32, on the CPU."""
    passes = Passes(program, module, device, graphs=False)
    passes.fill()
    with watched(module) as seen:
        output = passes.step()
    return {name: value.float().cpu() for name, value in {**seen, OUTPUT: output}.items()}


if __name__ == "__main__":
    main()
