"""Measure the bandwidth of the kernels between FP8 linears, beside torch.compile's of the same ops.

python benchmarks/fusions.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lltk.bench.clock import Clock, size_of
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import KERNEL_COLUMNS, column, script_options, script_parser, script_record
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.implementations import find_implementation, register_ops

_METHOD = """\
Bytes count every operand and result once, modulation and tables too. Of copy is the bandwidth as
a share of that of a copy which moves as many bytes. Compiled is the op's reference, fused by
torch.compile. A pass makes its calls in each of {layers} blocks, over {tokens} tokens. Queries
and keys are slices of rows of three times their width, as one linear writes them. Products
multiply FP8 operands: queries, keys and values by one product or by three."""
_A_BLOCK = {
    "quantise": 2,
    "gated sum, norm, quantise": 2,
    "sum, norm, quantise": 1,
    "GELU, quantise": 1,
    "RMS norm": 1,
    "norm of heads, rotation": 2,
}
"""How often a block of the step calls each op."""


def operands(
    device: torch.device, frames: int, tokens: int, heads: int, ffn: int
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What a block calls: a label, the op and its arguments."""
    width = heads * 128

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    table = torch.randn(1, frames, 3, width, device=device)
    scale, shift, gate = (part.squeeze(2).unsqueeze(2) for part in table.chunk(3, 2))
    x, y, merged = normal(1, tokens, width), normal(1, tokens, width), normal(1, tokens, 3 * width)
    cos, sin = torch.randn(2, 1, tokens, 1, 128, device=device).unbind()
    norm = {"scale": scale, "shift": shift, "eps": 1e-6, "to": "fp8"}
    for label, given in (
        ("quantise", {"x": x, "to": "fp8"}),
        ("gated sum, norm, quantise", {"x": x, "y": y, "gate": gate, **norm, "keep_sum": True}),
        ("sum, norm, quantise", {"x": x, "y": y, **norm, "keep_sum": True}),
        ("GELU, quantise", {"x": normal(1, tokens, ffn), "activation": "gelu", "to": "fp8"}),
        ("RMS norm", {"x": x, "scale": normal(width), "eps": 1e-6}),
    ):
        yield label, "row_pipeline", given
    rotated = {"weight": normal(width), "cos": cos, "sin": sin, "eps": 1e-6}
    yield "norm of heads, rotation", "rms_norm_rope", {"x": merged[..., :width], **rotated}


def kernels(
    clock: Clock, implementation: str, layers: int, **sizes: int
) -> Iterator[dict[str, Any]]:
    """Each op beside its reference, compiled, and beside a copy of as many bytes."""
    for label, op, given in operands(clock.device, **sizes):
        ours = find_implementation(op, implementation).load()
        compiled = torch.compile(find_implementation(op, "torch").load(), dynamic=False)
        size = size_of(*given.values(), ours(**given))
        times = clock.beside_copy(partial(ours, **given), size)
        fused = clock(partial(compiled, **given))["median_ms"]
        calls = layers * _A_BLOCK[label]
        yield {
            "op": label,
            "shape": list(given["x"].shape),
            **times,
            "compiled_ms": fused,
            "against_compiled": fused / times["median_ms"],
            "pass_ms": calls * times["median_ms"],
            "compiled_pass_ms": calls * fused,
            "copy_pass_ms": calls * times["copy_ms"],
        }


def products(clock: Clock, tokens: int, width: int, layers: int) -> Iterator[dict[str, Any]]:
    """Queries, keys and values by one FP8 product and by three."""
    name = "scaled_mm" if clock.cuda else "reference"
    multiply = find_implementation("fp8_matmul", name).load()
    x, weight = (
        torch.randn(rows, width, device=clock.device, dtype=torch.bfloat16)
        for rows in (tokens, 3 * width)
    )
    (values, scales), a = fp8_quantise(weight), fp8_quantise(x)
    parts = list(zip(values.split(width), scales.split(width), strict=True))
    for label, weights in (("one product", [(values, scales)]), ("three products", parts)):
        times = clock(
            lambda weights=weights: [multiply(*a, *w, None, torch.bfloat16) for w in weights]
        )
        yield {
            "op": label,
            "shape": [tokens, 3 * width, width],
            **times,
            "tflop_s": 6 * tokens * width * width / times["median_ms"] / 1e9,
            "pass_ms": layers * times["median_ms"],
        }


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=50)
    made.add_argument("--implementation", default="triton", help="of every op")
    made.add_argument("--frames", type=int, default=8, help="latent frames of a chunk")
    made.add_argument("--tokens", type=int, default=7040, help="of a chunk: 8 frames of 880")
    made.add_argument("--heads", type=int, default=24, help="heads of 128 channels")
    made.add_argument("--ffn", type=int, default=14336, help="the feed-forward's width")
    made.add_argument("--layers", type=int, default=30)
    return made


def main() -> None:
    """Measure and write the record."""
    options = script_options(parser())
    register_ops()
    clock = Clock(torch.device(options.device), options.runs)
    sizes = {name: getattr(options, name) for name in ("frames", "tokens", "heads", "ffn")}
    layers = options.layers
    with torch.no_grad():
        results = list(kernels(clock, options.implementation, layers, **sizes))
        names = ("pass_ms", "compiled_pass_ms", "copy_pass_ms")
        total = {name: sum(row[name] for row in results) for name in names}
        results.append({"op": "all", "shape": [], **total})
        results += products(clock, options.tokens, 128 * options.heads, layers)
    method = f"{clock.method} {_METHOD.format(layers=layers, tokens=options.tokens)}"
    record = script_record("fusions", f"Implementation {options.implementation}. {method}", results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        **KERNEL_COLUMNS,
        "of copy": column("of_copy", ".0%"),
        "compiled ms": column("compiled_ms", ".4f"),
        "speed-up": column("against_compiled", ".2f"),
        "TFLOP/s": column("tflop_s", ".0f"),
        "a pass, ms": column("pass_ms", ".2f"),
        "compiled": column("compiled_pass_ms", ".2f"),
        "copy": column("copy_pass_ms", ".2f"),
    }
    return markdown(record, "Kernels between FP8 linears", columns)


if __name__ == "__main__":
    main()
