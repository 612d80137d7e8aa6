"""Time the VAE's decoder for each video frame, and say which kernels take the time.

    python benchmarks/decode.py
    python benchmarks/decode.py --rows plain FP8 --runs 4

Weights are random and have the true shapes. Every row has the same weights, so that errors can be
compared too. The record is written after each row, and once more when every row's error against a
decode in float32 is known.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.profiler import profile

from lltk.bench.convolutions import convolutions, convolved
from lltk.bench.profiling import longest_kernels, profiled, timed
from lltk.bench.random_weights import with_random_weights
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.compiler import transform, with_weights
from lltk.graph.contract import Role
from lltk.graph.memory import readable
from lltk.graph.module import instantiate
from lltk.graph.passes import run_passes
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, load_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.passes import make_pass
from lltk.stream.decoder import Decoder

_METHOD = """\
Milliseconds are for one video frame: {runs} calls after two that warm up, timed by {how}. First s
is the time of the video's first five latents; it includes what has to be compiled or loaded and
no row above has compiled or loaded yet. A replayed row runs a call as one CUDA graph, with the
copies of its caches. Error is that of the video of five latents, relative to a decode in float32
and then to the first row. Owners are shares of a call's time, told apart by the names of its
kernels. Weights are random and have the true shapes."""
_OWNERS = {
    "compiled": ("triton_",),
    "norm and cache": ("_cached_norm_silu",),
    "upsampling": ("_upsample_residual",),
    "layout": ("nchwtonhwc", "nhwctonchw"),
    "attention": ("sdpa", "fmha", "flash", "attention"),
    "convolution": ("conv", "xmma", "fprop", "cutlass", "cudnn", "gemm", "nvjet", "sm90", "sm80"),
    "other": (),
}
"""Parts of kernels' names, by owner. A kernel belongs to the first owner that fits."""
_FUSED = ("fuse_norm_silu", "channels_last")
_ALL = ("fold_upsample", *_FUSED)
_FP8 = ("fold_upsample", "fuse_norm_silu", "fp8_convolve", "channels_last")
_MAKE_OPS = {"fold_upsample", "fuse_norm_silu", "fp8_convolve"}
"""Passes that make ops with several implementations."""
_EVENTS = {"aten::cudnn_convolution": (0, 1), "lltk::fp8_conv3d_triton": (0, 2)}
"""The places of a convolution's input and weight among the arguments of a profile's events."""


@dataclass(frozen=True)
class Row:
    """One way to decode.

    Attributes:
        passes: the passes after canonicalise.
        how: eager, compiled (by torch.compile) or replayed (as a CUDA graph).
        trial: whether cuDNN tries its kernels and takes the fastest.
        latents: how many latents a call decodes.
    """

    passes: tuple[str, ...] = ()
    how: str = "eager"
    trial: bool = False
    latents: int = 1


_OPENING = 5
"""Latents that every row decodes first: one alone, then four in calls of the row's own size."""
ROWS = {
    "plain": Row(),
    "fused": Row(_ALL),
    "FP8": Row(_FP8),
    "FP8, replayed": Row(_FP8, "replayed"),
    "FP8, 2 latents": Row(_FP8, latents=2),
    "fused, cuDNN's trial": Row(_ALL, trial=True),
    "fused, replayed": Row(_ALL, "replayed", trial=True),
    "fused, 2 latents": Row(_ALL, trial=True, latents=2),
    "fused, 4 latents": Row(_ALL, trial=True, latents=4),
    "fused, not folded": Row(_FUSED, trial=True),
    "channels last": Row(("channels_last",), trial=True),
    "fused, compiled": Row(_ALL, "compiled", trial=True),
    "folded, compiled": Row(("fold_upsample", "channels_last"), "compiled", trial=True),
    "plain, compiled": Row((), "compiled", trial=True),
}


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=8)
    made.add_argument("--recipe", default="wan22_decode", help="a file or a shipped recipe")
    made.add_argument(
        "--rows", nargs="*", choices=ROWS, default=list(ROWS), help="which to measure"
    )
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return list(options.rows)


def main() -> None:
    """Measure and write the record."""
    options = script_options(parser())
    recipe, device = load_recipe(find_recipe(options.recipe)), torch.device(options.device)
    bases = {1: with_random_weights(transform(recipe, weights=False), device)}
    weights = bases[1].weights
    results: list[dict[str, Any]] = []
    videos: list[Tensor] = []
    for name in rows(options):
        row = ROWS[name]
        if row.latents not in bases:
            bases[row.latents] = _captured(recipe, weights, latents=row.latents)
        result, video = _measured(bases[row.latents], row, device, options.runs)
        videos.append(video)
        results.append({"name": name, **result, "error_first": _error(video, videos[0])})
        print(results[-1], flush=True)
        _write(options.output, device, options.runs, results)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    exact = _exact(_captured(recipe, weights, dtype="float32"), device)
    for result, video in zip(results, videos, strict=True):
        result["error"] = _error(video, exact)
        print(result["name"], result["error"])
    _write(options.output, device, options.runs, results)


def _write(output: Path, device: torch.device, runs: int, results: list[dict[str, Any]]) -> None:
    how = "CUDA events" if device.type == "cuda" else "the wall clock"
    record = script_record("decode", _METHOD.format(runs=runs, how=how), results)
    write_record(output, record, text(record))


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "decoder": lambda row: row["name"],
        "ms a frame": lambda row: f"{row['frame']['median_ms']:.1f}",
        "p90": lambda row: f"{row['frame']['p90_ms']:.1f}",
        "TFLOP a frame": lambda row: f"{row['tflop']:.1f}",
        "first s": lambda row: f"{row['first_seconds']:.1f}",
        "peak memory": lambda row: readable(row["peak_bytes"]),
        "error": lambda row: f"{row['error']:.4f}" if "error" in row else "–",
        "against the first row": lambda row: f"{row['error_first']:.4f}",
        "owners": lambda row: ", ".join(f"{k} {v:.0%}" for k, v in row["owners"].items()) or "–",
        "passes": lambda row: ", ".join(row["passes"]),
    }
    return markdown(record, "Decoding", columns)


def _measured(
    base: Program, row: Row, device: torch.device, runs: int
) -> tuple[dict[str, Any], Tensor]:
    """A row's result, and its video of the first latents: float32, on the CPU."""
    program = _rewritten(base, row.passes, device)
    torch.backends.cudnn.benchmark = row.trial
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    module = instantiate(program, device)
    if row.how == "compiled":
        module.compile_graph("steps" if row.latents > 1 else "step")
    decoder = Decoder(program, module, row.how == "replayed")
    latents = _latents(program, device)
    begun = time.perf_counter()
    video = _decoded(decoder, latents)
    first = time.perf_counter() - begun
    steady = latents[:, :, -row.latents :]
    call = lambda: decoder.decode(steady)  # noqa: E731
    frames = program.model.stride[0] * row.latents
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    tflop = convolved(_steady(program)) / frames / 1e12
    return {
        "passes": [entry.name for entry in program.log],
        "ran": dict(program.implementations),
        "how": row.how,
        "trial": row.trial,
        "latents": row.latents,
        "frame": {k: v / frames for k, v in timed(call, device, runs, warm_up=2).items()},
        "tflop": tflop,
        "first_seconds": first,
        "peak_bytes": peak,
        **_profiled(call, program, device),
    }, video


def _rewritten(base: Program, passes: tuple[str, ...], device: torch.device) -> Program:
    steps = [make_pass(name, {}) for name in passes]
    if _MAKE_OPS.intersection(passes):
        name = "triton" if device.type == "cuda" else "reference"
        steps.append(make_pass("lower", {"prefer": [name]}))
    return run_passes(base, steps)


def _latents(program: Program, device: torch.device) -> Tensor:
    """A video's first latents, [B, C, 5, h, w]."""
    batch, channels, _, *sides = program.contract("first").input(Role.LATENTS).shape
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(batch, channels, _OPENING, *sides, generator=generator, device=device)


@torch.no_grad()
def _decoded(decoder: Decoder, latents: Tensor) -> Tensor:
    video = decoder.decode(latents)
    return video.float().cpu()


def _captured(recipe: Recipe, weights: Mapping[str, Tensor], **model: Any) -> Program:
    """The recipe's program with changes to its model section."""
    section = recipe.model.model_copy(update=model)
    program = transform(recipe.model_copy(update={"model": section}), weights=False)
    return with_weights(program, weights)


def _exact(program: Program, device: torch.device) -> Tensor:
    """The video of the first latents, decoded in float32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        decoder = Decoder(program, instantiate(program, device))
        return _decoded(decoder, _latents(program, device))


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).std() / theirs.std())


@torch.no_grad()
def _profiled(call: Callable[[], object], program: Program, device: torch.device) -> dict[str, Any]:
    """Who takes a call's time on a GPU: by owner, by kernel, and by shape of a convolution."""
    owners, found = profiled(call, device, _OWNERS)
    if found is None:
        return {"owners": {}, "kernels": [], "convolutions": []}
    return {
        "owners": owners,
        "kernels": longest_kernels(found),
        "convolutions": _by_shape(found, program),
    }


def _by_shape(found: profile, program: Program) -> list[dict[str, Any]]:
    """The convolutions of eager calls, by the shapes of their operands, longest first."""
    taken: dict[tuple[tuple[int, ...], ...], float] = defaultdict(float)
    for event in found.key_averages(group_by_input_shape=True):
        if event.key in _EVENTS:
            operands = tuple(tuple(event.input_shapes[place]) for place in _EVENTS[event.key])
            taken[operands] += event.device_time_total / 1e3
    rows = []
    for operands, (count, flops) in convolutions(_steady(program)).items():
        ms = taken[operands]
        speed = {"tflop": flops / 1e12, "tflops": flops / ms / 1e9 if ms else 0.0}
        rows.append(
            {"input": operands[0], "weight": operands[1], "count": count, "ms": ms, **speed}
        )
    return sorted(rows, key=lambda row: -row["ms"])


def _steady(program: Program) -> fx.Graph:
    """The graph of a call."""
    return program.graphs.get("steps", program.graphs["step"])


if __name__ == "__main__":
    main()
