"""Time of the transformer's passes at a full window, and where it goes.

    .venv/bin/python benchmarks/dit.py [RECIPE …] [--runs 20]

Recipes are files or shipped recipes' names, of one model; by default each step from copied
pages in bfloat16 to FP8 throughout. Weights are random at the true shape, the same for every
recipe, so errors can be compared too.

Writes dit.json and dit.md beside this file, or into --output.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import DeviceType, ProfilerActivity, profile

from lltk.bench.random_weights import with_random_weights
from lltk.bench.record import make_record, markdown, percentile, write_record
from lltk.cli.recipes import find_recipe
from lltk.compiler import transform
from lltk.graph.memory import readable
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, load_recipe
from lltk.stream.rollout import Rollout

HERE = Path(__file__).parent
_METHOD = """\
Milliseconds of {runs} passes after a warm-up of three, with the cache full: {how}. DiT FPS: a
chunk's video frames over its denoising passes and its commit. First: the first denoising pass and
the first commit; of compilation, what no recipe above has compiled. Error: of the first recipe's
eager output, relative, one denoising pass with the recipe's own cache. Owners: shares of the time
of a denoising pass, by the names of its kernels. Random weights of the true shape."""
_OWNERS = {
    "attention": ("sdpa", "fmha", "flash", "attention"),
    "GEMM": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "scaled_mm"),
    "communication": ("nccl",),
}
"""Parts of the names of an owner's kernels; what has none is element-wise."""
_FUSED = ("triton_per_", "triton_poi_", "triton_red_")
"""How the names of torch.compile's element-wise kernels begin, which name their neighbours too."""


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    steps = [str(HERE / "dit" / f"{name}.yaml") for name in ("copied_pages", "fp8_attention")]
    default = [steps[0], "wan22_5b_stream", "wan22_5b_stream_fp8", steps[1]]
    parser.add_argument("recipes", nargs="*", default=default)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    recipes = {Path(name).stem: load_recipe(find_recipe(name)) for name in options.recipes}
    results: list[dict[str, Any]] = []
    reference = None
    for name, recipe in recipes.items():
        for row, output in _rows(recipe, options.device, options.runs, reference is None):
            reference = output if reference is None else reference
            error = float((output - reference).std() / reference.std())
            results.append({"name": name, **row, "error": error})
            print(results[-1], flush=True)
    how = "CUDA events" if options.device.type == "cuda" else "wall time"
    record = make_record(
        "dit",
        f"benchmarks/dit.py {' '.join(sys.argv[1:])}".strip(),
        _METHOD.format(runs=options.runs, how=how).replace("\n", " "),
        results,
    )
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "recipe": lambda row: row["name"],
        "blocks": lambda row: "compiled" if row["compiled"] else "eager",
        "step ms": lambda row: f"{row['step']['median_ms']:.1f}",
        "p90": lambda row: f"{row['step']['p90_ms']:.1f}",
        "commit ms": lambda row: f"{row['commit']['median_ms']:.1f}",
        "DiT FPS, 4 steps": lambda row: f"{row['dit_fps']['4']:.1f}",
        "2 steps": lambda row: f"{row['dit_fps']['2']:.1f}",
        "first s": lambda row: f"{row['first_seconds']:.1f}",
        "peak memory": lambda row: readable(row["peak_bytes"]),
        "error": lambda row: f"{row['error']:.4f}",
        "owners": lambda row: ", ".join(f"{k} {v:.0%}" for k, v in row["owners"].items()) or "–",
        "ran": lambda row: ", ".join(f"{op} {how}" for op, how in row["ran"].items()),
    }
    write_record(options.output / "dit", record, markdown(record, "Transformer passes", columns))


def _rows(
    recipe: Recipe, device: torch.device, runs: int, eager: bool
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """A recipe's result and its output, float32, with compiled blocks; eager before, if wanted."""
    program = with_random_weights(transform(recipe, weights=False), device)
    module = instantiate(program, device)
    frames = program.geometry.chunk * program.spec.stride[0]
    for compiled in (False, True) if eager else (True,):
        if compiled:
            module.compile_blocks()
        with torch.no_grad():
            row, output = _measured(program, module, device, runs)
        step, commit = row["step"]["median_ms"], row["commit"]["median_ms"]
        fps = {str(n): frames / (n * step + commit) * 1e3 for n in (4, 2)}
        ran = dict(program.implementations)
        yield {"compiled": compiled, **row, "dit_fps": fps, "ran": ran}, output


def _measured(
    program: Program, module: ProgramModule, device: torch.device, runs: int
) -> tuple[dict[str, Any], Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    geometry, spec = program.geometry, program.spec

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(program.dtype)

    shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
    latents = normal(*shape)
    level = torch.full((1, geometry.chunk), 700.0, device=device)
    positions = torch.arange(geometry.chunk, dtype=torch.float64, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = Rollout(program, module)
    run.set_text(normal(1, geometry.text_tokens, spec.text_dim))

    def step() -> Tensor:
        return run.step(latents, level, positions)

    def commit() -> None:
        run.commit(latents, positions)

    begun = time.perf_counter()
    step()
    commit()
    _wait(device)
    first = time.perf_counter() - begun
    for _ in range(geometry.pages):
        run.commit(normal(*shape), positions)
    output = step().float()
    row = {"step": _timed(step, device, runs), "owners": _owners(step, device)}
    row["commit"] = _timed(commit, device, runs)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {**row, "first_seconds": first, "peak_bytes": peak}, output


def _timed(call: Callable[[], object], device: torch.device, runs: int) -> dict[str, float]:
    for _ in range(3):
        call()
    _wait(device)
    times = []
    for _ in range(runs):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            _wait(device)
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            call()
            times.append((time.perf_counter() - begun) * 1e3)
    return {"median_ms": statistics.median(times), "p90_ms": percentile(times, 0.9)}


def _owners(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Shares of a call's time on a GPU, by owner, idle time too."""
    if device.type != "cuda":
        return {}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        start.record()
        call()
        end.record()
        _wait(device)
    total = start.elapsed_time(end) * 1e3
    taken: dict[str, float] = {}
    for event in found.key_averages():
        if event.device_type == DeviceType.CUDA:
            name = event.key.lower()
            owners = (o for o, parts in _OWNERS.items() if any(part in name for part in parts))
            owner = "element-wise" if name.startswith(_FUSED) else next(owners, "element-wise")
            taken[owner] = taken.get(owner, 0) + event.self_device_time_total
    taken["idle"] = max(0.0, total - sum(taken.values()))
    return {owner: time / total for owner, time in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
