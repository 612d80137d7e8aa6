"""Time the VAE's encoder for each video frame, beside diffusers' own.

    python benchmarks/encode.py
    python benchmarks/encode.py --rows diffusers fused --frames 17 --runs 2

Weights are random and have the true shapes. Every row has the same weights and encodes the same
clip, so that errors can be compared too. The record is written after each row.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lltk.bench.convolutions import convolved
from lltk.bench.profiling import longest_kernels, profiled, timed, wait
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
from lltk.models.wan_vae import build, encode
from lltk.passes import make_pass
from lltk.stream.encoder import Encoder

_METHOD = """\
Milliseconds are for one video frame: those of a whole clip of {frames} frames, divided by them;
{runs} runs after two that warm up, timed by {how}. The clip is on the device before. First s is the
time of the first run; it includes what has to be compiled or loaded and no row above has compiled
or loaded yet. A row with several latents makes so many in a call; diffusers makes one. Error is
that of the latents, relative to diffusers' in float32. Owners are shares of a run's time, told
apart by the names of its kernels. In all rows but the first, cuDNN tries its kernels and takes the
fastest. Weights are random and have the true shapes."""
_OWNERS = {
    "compiled": ("triton_",),
    "norm and cache": ("_cached_norm_silu",),
    "layout": ("nchwtonhwc", "nhwctonchw"),
    "attention": ("sdpa", "fmha", "flash", "attention"),
    "convolution": ("conv", "xmma", "fprop", "cutlass", "cudnn", "gemm", "nvjet", "sm90", "sm80"),
    "other": (),
}
"""Parts of kernels' names, by owner. A kernel belongs to the first owner that fits."""
_FUSED = ("fuse_norm_silu", "channels_last", "lower")
_FP8 = ("fuse_norm_silu", "fp8_convolve", "channels_last", "lower")
_WARM_UP = 2


@dataclass(frozen=True)
class Row:
    """One way to encode.

    Attributes:
        passes: the passes after canonicalise; None for diffusers' module.
        how: eager, compiled (by torch.compile) or replayed (as a CUDA graph).
        latents: how many latents a call makes.
        channels_last: whether weights of diffusers' module lie in memory with channels last.
        trial: whether cuDNN tries its kernels and takes the fastest.
    """

    passes: tuple[str, ...] | None = None
    how: str = "eager"
    latents: int = 1
    channels_last: bool = False
    trial: bool = True


ROWS = {
    "diffusers": Row(trial=False),
    "diffusers, channels last": Row(channels_last=True),
    "fused": Row(_FUSED),
    "fused, 2 latents": Row(_FUSED, latents=2),
    "fused, 4 latents": Row(_FUSED, latents=4),
    "fused, 2 latents, replayed": Row(_FUSED, "replayed", latents=2),
    "FP8, 2 latents": Row(_FP8, latents=2),
    "fused, 2 latents, compiled": Row(_FUSED, "compiled", latents=2),
    "channels last, 2 latents, compiled": Row(("channels_last",), "compiled", latents=2),
    "diffusers, channels last, compiled": Row(how="compiled", channels_last=True),
}
"""Those that compile come last: they take the longest."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=3)
    made.add_argument("--recipe", default="wan22_encode", help="a file or a shipped recipe")
    made.add_argument(
        "--frames", type=int, default=33, help="of the clip, 1 + a multiple of 4 (default: 33)"
    )
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
    bases = {1: with_random_weights(_captured(recipe, 1), device)}
    weights = bases[1].weights
    clip = _clip(bases[1], options.frames, device)
    exact = _exact(recipe, bases[1], clip)
    how = "CUDA events" if device.type == "cuda" else "the wall clock"
    method = _METHOD.format(frames=options.frames, runs=options.runs, how=how)
    results: list[dict[str, Any]] = []
    for name in rows(options):
        row = ROWS[name]
        if row.latents not in bases:
            bases[row.latents] = with_weights(_captured(recipe, row.latents), weights)
        results.append({"name": name, **_measured(bases[row.latents], row, clip, exact, options)})
        print({k: v for k, v in results[-1].items() if k != "kernels"}, flush=True)
        record = script_record("encode", method, results)
        write_record(options.output, record, text(record))
        _free(device)


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "encoder": lambda row: row["name"],
        "ms a frame": lambda row: f"{row['frame']['median_ms']:.2f}",
        "p90": lambda row: f"{row['frame']['p90_ms']:.2f}",
        "TFLOP a frame": lambda row: f"{row['tflop']:.2f}",
        "TFLOP/s": lambda row: f"{row['tflop'] / row['frame']['median_ms'] * 1e3:.0f}",
        "first s": lambda row: f"{row['first_seconds']:.1f}",
        "peak memory": lambda row: readable(row["peak_bytes"]),
        "error": lambda row: f"{row['error']:.4f}",
        "owners": lambda row: ", ".join(f"{k} {v:.0%}" for k, v in row["owners"].items()) or "–",
        "passes": lambda row: ", ".join(row["passes"]) or "–",
    }
    return markdown(record, "Encoding", columns)


def _captured(recipe: Recipe, latents: int) -> Program:
    """The recipe's model in canonical form, without weights."""
    model = recipe.model.model_copy(update={"latents": latents})
    update = {"model": model, "passes": ["canonicalise"]}
    return transform(recipe.model_copy(update=update), weights=False)


def _clip(program: Program, frames: int, device: torch.device) -> Tensor:
    """A video, float32 [B, 3, frames, H, W] in [-1, 1]."""
    batch, channels, _, *sides = program.contract("first").input(Role.VIDEO).shape
    generator = torch.Generator(device).manual_seed(1)
    made = torch.rand(batch, channels, frames, *sides, generator=generator, device=device)
    return 2 * made - 1


def _diffusers(program: Program, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' module with the weights of a Program. Its decoder has none."""
    with torch.device("meta"):
        vae = build(program.recipe["model"]["config"])
    own = {name: weight.to(device, dtype) for name, weight in program.weights.items()}
    vae.load_state_dict(own, strict=False, assign=True)
    return vae.eval()


@torch.no_grad()
def _exact(recipe: Recipe, program: Program, clip: Tensor) -> Tensor:
    """The clip's latents by diffusers' module in float32, on the CPU."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        made = encode(_diffusers(program, torch.float32, clip.device), clip).cpu()
    _free(clip.device)
    return made


def _measured(
    base: Program, row: Row, clip: Tensor, exact: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """A row's result."""
    device, frames = clip.device, clip.shape[2]
    torch.backends.cudnn.benchmark = row.trial
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    program = base if row.passes is None else _rewritten(base, row.passes, device)
    run = _module(program, row, device) if row.passes is None else _program(program, row, device)
    begun = time.perf_counter()
    latents = run(clip).float().cpu()
    first = time.perf_counter() - begun
    times = timed(lambda: run(clip), device, options.runs, warm_up=_WARM_UP - 1)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    owners, found = profiled(lambda: run(clip), device, _OWNERS)
    return {
        "passes": [] if row.passes is None else [entry.name for entry in program.log],
        "ran": {} if row.passes is None else dict(program.implementations),
        "how": row.how,
        "trial": row.trial,
        "latents": row.latents,
        "frames": frames,
        "frame": {key: value / frames for key, value in times.items()},
        "tflop": _tflop(program, row.latents, frames),
        "first_seconds": first,
        "peak_bytes": peak,
        "error": float((latents - exact).std() / exact.std()),
        "owners": owners,
        "kernels": [] if found is None else longest_kernels(found),
    }


def _rewritten(base: Program, passes: tuple[str, ...], device: torch.device) -> Program:
    name = "triton" if device.type == "cuda" else "reference"
    options = {"lower": {"prefer": [name]}}
    return run_passes(base, [make_pass(each, options.get(each, {})) for each in passes])


def _module(program: Program, row: Row, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Encoding by diffusers' module, as it ships it or changed as the row says."""
    vae = _diffusers(program, program.dtype, device)
    if row.channels_last:
        for module in vae.encoder.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
            elif isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    if row.how == "compiled":
        vae.encoder = _Compiled(vae.encoder)
    return lambda clip: encode(vae, clip)


class _Compiled(nn.Module):
    """diffusers' encoder, of which only the form that a video's later calls take is compiled."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.eager = encoder
        self.compiled = torch.compile(encoder, dynamic=False)

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        known = feat_cache[0]
        steady = known is not None and known.shape[2] > 1
        encoder = self.compiled if steady else self.eager
        made: Tensor = encoder(x, feat_cache=feat_cache, feat_idx=feat_idx)
        return made


def _program(program: Program, row: Row, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Encoding by a Program."""
    module = instantiate(program, device)
    if row.how == "compiled":
        module.compile_graph("steps" if row.latents > 1 else "step", dynamic=False)
    return Encoder(program, module, row.how == "replayed").encode


def _tflop(program: Program, latents: int, frames: int) -> float:
    """What a frame of the clip takes, in calls of so many latents."""
    graph = program.graphs["steps" if latents > 1 else "step"]
    steady = convolved(graph) * (frames - 1) / (latents * program.model.stride[0])
    return (convolved(program.graphs["first"]) + steady) / frames / 1e12


def _free(device: torch.device) -> None:
    """Let go of what a row compiled and allocated."""
    torch._dynamo.reset()
    gc.collect()
    wait(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
