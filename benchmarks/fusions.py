"""Bandwidth of the kernels between FP8 linears, on one device, against a compiler's.

    .venv/bin/python benchmarks/fusions.py [--runs 50]

Writes fusions.json and fusions.md beside this file, or into --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lltk.bench.clock import Clock
from lltk.bench.record import make_record, markdown, write_record
from lltk.ops.implementations import find_implementation, register_ops

_METHOD = """\
Bytes: every operand and result once, modulation and tables too. Of copy: their bandwidth as a share
of a copy's that moves as many bytes. Compiled: the same op's reference, fused by torch.compile. A
pass: that many calls in each of {layers} blocks. {tokens} tokens; queries and keys are slices of
rows of three times their width, as one linear writes them. Products: of FP8 operands, queries, keys
and values by one or by three."""
_A_BLOCK = {
    "fp8_quantise": 2,
    "fp8_quantise_norm": 1,
    "fp8_quantise_add_norm": 1,
    "fp8_quantise_add_norm, no gate": 1,
    "fp8_quantise_gelu": 1,
    "gated_add": 1,
    "rms_norm_rope": 2,
}
"""Calls in a block of the step."""


def moved(*values: Any) -> int:
    """Bytes of tensors."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def operands(
    device: torch.device, frames: int, tokens: int, heads: int, ffn: int
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The arguments of each op in a block, by label; a label begins with its op's name."""
    width = heads * 128

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    table = torch.randn(1, frames, 3, width, device=device)
    scale, shift, gate = (part.squeeze(2).unsqueeze(2) for part in table.chunk(3, 2))
    x, y, merged = normal(1, tokens, width), normal(1, tokens, width), normal(1, tokens, 3 * width)
    cos, sin = torch.randn(2, 1, tokens, 1, 128, device=device).unbind()
    yield "fp8_quantise", (x,)
    yield "fp8_quantise_norm", (x, scale, shift, 1e-6)
    yield "fp8_quantise_add_norm", (x, y, gate, scale, shift, 1e-6)
    yield "fp8_quantise_add_norm, no gate", (x, y, None, scale, shift, 1e-6)
    yield "fp8_quantise_gelu", (normal(1, tokens, ffn),)
    yield "gated_add", (x, y, gate)
    yield "rms_norm_rope", (merged[..., :width], normal(width), cos, sin, 1e-6)


def kernels(
    clock: Clock, implementation: str, layers: int, **sizes: int
) -> Iterator[dict[str, Any]]:
    """Each op beside its reference, compiled, and a copy of as many bytes."""
    for label, arguments in operands(clock.device, **sizes):
        op = label.partition(",")[0]
        ours = find_implementation(op, implementation).load()
        compiled = torch.compile(find_implementation(op, "torch").load(), dynamic=False)
        result = ours(*arguments)
        written = moved(result) if isinstance(result, Tensor) else moved(*result)
        size = moved(*arguments) + written
        source = torch.empty(size // 2, dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        times = clock(lambda ours=ours, given=arguments: ours(*given))
        fused = clock(lambda fused=compiled, given=arguments: fused(*given))
        copy = clock(lambda source=source, target=target: target.copy_(source))
        calls = layers * _A_BLOCK[label]
        yield {
            "op": label,
            "shape": list(arguments[0].shape),
            "bytes": size,
            **times,
            "gb_s": size / times["median_ms"] / 1e6,
            "of_copy": copy["median_ms"] / times["median_ms"],
            "compiled_ms": fused["median_ms"],
            "against_compiled": fused["median_ms"] / times["median_ms"],
            "pass_ms": calls * times["median_ms"],
            "compiled_pass_ms": calls * fused["median_ms"],
            "copy_pass_ms": calls * copy["median_ms"],
        }


def products(clock: Clock, tokens: int, width: int, layers: int) -> Iterator[dict[str, Any]]:
    """Queries, keys and values by one product and by three, on what multiplies FP8."""
    name = "scaled_mm" if clock.cuda else "reference"
    multiply = find_implementation("fp8_matmul", name).load()
    quantise = find_implementation("fp8_quantise", "torch").load()
    x, weight = (
        torch.randn(rows, width, device=clock.device, dtype=torch.bfloat16)
        for rows in (tokens, 3 * width)
    )
    (values, scales), a = quantise(weight), quantise(x)
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


def number(name: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A column, empty where a result has no such number."""
    return lambda result: format(result[name], form) if name in result else ""


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--implementation", default="triton", help="of every op")
    parser.add_argument("--frames", type=int, default=8, help="of a chunk")
    parser.add_argument("--tokens", type=int, default=7040, help="of a chunk: 8 frames of 880")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels")
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    register_ops()
    clock = Clock(options.device, options.runs)
    sizes = {name: getattr(options, name) for name in ("frames", "tokens", "heads", "ffn")}
    layers = options.layers
    with torch.no_grad():
        results = list(kernels(clock, options.implementation, layers, **sizes))
        names = ("pass_ms", "compiled_pass_ms", "copy_pass_ms")
        total = {name: sum(row[name] for row in results) for name in names}
        results.append({"op": "all", "shape": [], **total})
        results += products(clock, options.tokens, 128 * options.heads, layers)
    method = f"{clock.method} {_METHOD.format(layers=layers, tokens=options.tokens)}"
    record = make_record(
        "fusions",
        f"benchmarks/fusions.py {' '.join(sys.argv[1:])}".strip(),
        f"Implementation {options.implementation}. {method}".replace("\n", " "),
        results,
    )
    text = markdown(
        record,
        "Kernels between FP8 linears",
        {
            "op": lambda result: result["op"],
            "shape": lambda result: "×".join(map(str, result["shape"])),
            "median ms": number("median_ms", ".4f"),
            "p90 ms": number("p90_ms", ".4f"),
            "GB/s": number("gb_s", ".0f"),
            "of copy": number("of_copy", ".0%"),
            "compiled ms": number("compiled_ms", ".4f"),
            "speed-up": number("against_compiled", ".2f"),
            "TFLOP/s": number("tflop_s", ".0f"),
            "a pass, ms": number("pass_ms", ".2f"),
            "compiled": number("compiled_pass_ms", ".2f"),
            "copy": number("copy_pass_ms", ".2f"),
        },
    )
    write_record(options.output / "fusions", record, text)
    print(text)


if __name__ == "__main__":
    main()
