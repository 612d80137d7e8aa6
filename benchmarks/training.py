"""Time a training call of the 5B's shape: seconds a layer, forward and backward.

    python benchmarks/training.py
    python benchmarks/training.py --frames 32 --layers 2 4

Two models with few layers are timed. The difference of their times is that of the layers that one
has more. Weights, clips and embeddings are random.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lltk.bench.profiling import longest_kernels, profiled, timed
from lltk.bench.random_weights import with_random_weights
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.compiler import transform
from lltk.graph.memory import readable
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import parse_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.models.configs import named_config
from lltk.train.data import Batch
from lltk.train.flow_matching import FlowMatching

RECIPE = "wan22_5b_train"
_METHOD = """\
One call of {recipe} at {frames} latent frames, batch 1: the objective's forward and backward pass,
with the drawing of noise, and without the optimiser. Milliseconds of {runs} runs after two that
warm up. Seconds a layer are the difference between the medians of {layers} layers, by layer; ends
are what the smaller model takes beyond its layers. Peak memory is torch's, of the larger model,
without an optimiser's state. Gradient error is the relative norm of the difference to the first
row's, of the first block's keys. Owners are shares of the larger model's time, told apart by the
names of its kernels. Weights, clips and embeddings are random and have the true shapes."""
_OWNERS = {
    "element-wise, compiled": ("triton_per_", "triton_poi_", "triton_red_"),
    "attention": ("sdpa", "fmha", "flash", "attention", "flex"),
    "GEMM": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
    "element-wise": (),
}


@dataclass(frozen=True)
class Row:
    """One way to run a call; every block is recomputed in the backward pass.

    Attributes:
        attention: what runs self-attention.
        compiled: whether blocks are compiled.
        kept: whether the results of attention are kept.
    """

    attention: str
    compiled: bool
    kept: bool

    @property
    def name(self) -> str:
        kept = "attention kept" if self.kept else "all recomputed"
        return f"{self.attention}, {'compiled' if self.compiled else 'eager'}, {kept}"


ROWS = {
    row.name: row
    for row in (
        Row("sdpa", False, False),
        Row("cudnn", True, False),
        Row("cudnn", True, True),
        Row("sdpa", True, False),
        Row("flex", True, False),
    )
}


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=4)
    made.add_argument("--frames", type=int, default=96, help="latent frames (default: 96)")
    made.add_argument("--layers", type=int, nargs=2, default=[2, 4], help="(default: 2 4)")
    made.add_argument("--model", default="wan22_5b", help="a named configuration")
    made.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return list(options.rows)


def main() -> None:
    """Measure, and write the record again after each row."""
    options = script_options(parser())
    layers = " and ".join(map(str, options.layers))
    facts = {"recipe": RECIPE, "frames": options.frames, "runs": options.runs, "layers": layers}
    results: list[dict[str, Any]] = []
    first = None
    for name in options.rows:
        result, gradient = measure(ROWS[name], options)
        first = gradient if first is None else first
        result["gradient_error"] = float((gradient - first).norm() / first.norm())
        results.append({"name": name} | result)
        record = script_record("training", _METHOD.format(**facts), results)
        write_record(options.output, record, text(record))
        print(results[-1], flush=True)
    print(text(record))


def measure(row: Row, options: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """A row's times, and the gradient of the first block's keys."""
    device = torch.device(options.device)
    torch._dynamo.reset()
    found: dict[str, Any] = {"milliseconds": {}}
    for layers in options.layers:
        program = program_of(row, options, layers, device)
        module = instantiate(program, device)
        module.recompute_blocks(layers if row.kept else 0)
        if row.compiled:
            module.compile_blocks()
        call = call_of(program, module, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found["milliseconds"][str(layers)] = timed(call, device, options.runs, warm_up=2)
        if device.type == "cuda":
            found["peak"] = torch.cuda.max_memory_allocated(device)
        gradient = module.get_parameter("blocks.0.attn1.to_k.weight").grad
        assert gradient is not None
        kept = gradient.float().cpu()
    found["owners"], profile = profiled(call, device, _OWNERS)
    found["kernels"] = [] if profile is None else longest_kernels(profile)
    few, many = options.layers
    less, more = (found["milliseconds"][str(count)]["median_ms"] for count in (few, many))
    found["layer_s"] = (more - less) / (many - few) / 1e3
    found["ends_s"] = less / 1e3 - few * found["layer_s"]
    del call, module, program
    gc.collect()
    return found, kept


def program_of(row: Row, options: argparse.Namespace, layers: int, device: torch.device) -> Program:
    """The recipe's Program with few layers and random weights."""
    config = dict(named_config(options.model)) | {"num_layers": layers}
    data = dict(read_recipe(find_recipe(RECIPE), [f"geometry.frames={options.frames}"]))
    data["model"] = dict(data["model"]) | {"checkpoint": None, "config": config}
    data["passes"] = [
        step if step != "lower" else {"lower": {"block_causal_attention": row.attention}}
        for step in data["passes"]
    ]
    return with_random_weights(transform(parse_recipe(data, RECIPE), weights=False), device)


def call_of(program: Program, module: ProgramModule, device: torch.device) -> Callable[[], object]:
    """A training call over one random clip."""
    geometry, spec = program.geometry, program.spec
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, spec.channels, geometry.frames, *geometry.latent(spec))
    text = (1, geometry.chunks, geometry.text_tokens, spec.text_dim)
    tensors = {
        "latents": torch.randn(shape, generator=generator, device=device),
        "text": torch.randn(text, generator=generator, device=device),
    }
    objective = FlowMatching(program, module)
    batch = Batch(0, range(1), tensors)

    def call() -> None:
        module.zero_grad(set_to_none=True)
        (objective.loss(batch) / geometry.frames).backward()

    return call


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "row": lambda row: row["name"],
        "seconds a layer": column("layer_s", ".3f"),
        "ends s": column("ends_s", ".3f"),
        "ms, by layers (p90)": lambda row: ", ".join(
            f"{count}: {times['median_ms']:.0f} ({times['p90_ms']:.0f})"
            for count, times in row["milliseconds"].items()
        ),
        "peak memory": lambda row: readable(row["peak"]) if "peak" in row else "–",
        "gradient error": column("gradient_error", ".1e"),
        "owners": lambda row: (
            ", ".join(f"{owner} {100 * share:.0f} %" for owner, share in row["owners"].items())
            or "–"
        ),
    }
    return markdown(record, "Training calls of the 5B's shape", columns)


if __name__ == "__main__":
    main()
