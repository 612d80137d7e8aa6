"""Bandwidth of NVFP4's kernels and speed of its products, on one device.

    .venv/bin/python benchmarks/nvfp4.py [--backend triton] [--runs 50]

Writes nvfp4.json and nvfp4.md beside this file, or into --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lltk.bench.clock import Clock
from lltk.bench.record import make_record, markdown, write_record
from lltk.ops.hadamard.reference import SIGNS
from lltk.ops.implementations import register_ops
from lltk.ops.nvfp4_backends import check_backend

_METHOD = """\
Bytes: what kernels read and write of their operands and results; quantising reads its input twice,
once for the amax. Once: every operand and result counted once. GB/s and its share of a copy are of
bytes; the copy moves as many, in the same manner. Products: against torch.matmul of bfloat16
operands of the same shape."""


def moved(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bandwidths(
    clock: Clock, tokens: int, width: int, ffn: int, backend: str
) -> Iterator[dict[str, Any]]:
    """Ops that memory bounds, each beside a copy of as many bytes."""
    ops, device = torch.ops.lltk, clock.device
    seed = torch.tensor([1, 2], device=device)
    signs = list(SIGNS)
    weight = torch.randn(ffn, width, device=device, dtype=torch.bfloat16)

    def row(
        op: str, operands: tuple[Tensor, ...], call: Callable[[], Any], reads: int = 1
    ) -> dict[str, Any]:
        result = call()
        written = moved(*([result] if isinstance(result, Tensor) else result))
        size = reads * moved(*operands) + written
        source = torch.empty(size // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times = clock(call)
        copy = clock(lambda: target.copy_(source))
        speed, copied = (size / t["median_ms"] / 1e6 for t in (times, copy))
        return {
            "op": op,
            "shape": list(operands[0].shape),
            "bytes": size,
            "once": moved(*operands) + written,
            **times,
            "gb_s": speed,
            "copy_gb_s": copied,
            "of_copy": speed / copied,
        }

    for columns in (width, ffn):
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
        quantised = ops.nvfp4_quantise(x, 1, "none", None, 0, backend)
        yield row(
            "quantise",
            (x,),
            lambda x=x: ops.nvfp4_quantise(x, 1, "none", None, 0, backend),
            reads=2,
        )
        yield row(
            "dequantise to bfloat16",
            quantised,
            lambda q=quantised: ops.nvfp4_dequantise(*q, torch.bfloat16, backend),
        )
    for name, rule, random in (
        ("quantise, stochastic", "none", seed),
        ("quantise, 4/6 mse", "mse", None),
        ("quantise, 4/6 abs_max", "abs_max", None),
    ):
        yield row(
            name,
            (x,),
            lambda rule=rule, random=random: ops.nvfp4_quantise(x, 1, rule, random, 0, backend),
            reads=2,
        )
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    scale, shift = torch.randn(2, 1, width, device=device).unbind()

    def in_two() -> Any:
        made = F.layer_norm(hidden.float(), (width,), eps=1e-6) * scale + shift
        return ops.nvfp4_quantise(made.to(hidden.dtype), 1, "none", None, 0, backend)

    yield row(
        "norm + modulate + quantise, fused",
        (hidden,),
        lambda: ops.nvfp4_quantise_norm(hidden, scale, shift, 1e-6, "none", backend),
        reads=2,
    )
    yield row("norm + modulate + quantise, torch and quantise", (hidden,), in_two, reads=2)
    yield row(
        "quantise, 16×16",
        (weight,),
        lambda: ops.nvfp4_quantise(weight, 16, "none", None, 0, backend),
        reads=2,
    )
    codes, scales, _ = ops.nvfp4_quantise(weight, 16, "none", None, 0, backend)
    yield row(
        "transpose codes", (codes, scales), lambda: ops.nvfp4_transpose(codes, scales, backend)
    )
    yield row("Hadamard", (x,), lambda: ops.hadamard(x, signs, backend))
    for name, random in (("", None), (", stochastic", seed)):
        yield row(
            f"Hadamard + quantise + transpose, fused{name}",
            (x,),
            lambda random=random: ops.nvfp4_quantise_transposed(
                x, signs, "none", random, 0, backend
            ),
            reads=2,
        )

    def unfused() -> Any:
        turned = ops.hadamard(x.t().contiguous(), signs, backend)
        return ops.nvfp4_quantise(turned, 1, "none", None, 0, backend)

    if tokens % len(signs) == 0:
        yield row("Hadamard + quantise + transpose, in three", (x,), unfused, reads=2)


def products(
    clock: Clock, tokens: int, width: int, ffn: int, backend: str
) -> Iterator[dict[str, Any]]:
    """Products of the feed-forward and attention layers against bfloat16's."""
    ops = torch.ops.lltk
    for n, k in ((width, width), (ffn, width), (width, ffn)):
        x, weight = (
            torch.randn(rows, k, device=clock.device, dtype=torch.bfloat16) for rows in (tokens, n)
        )
        a = ops.nvfp4_quantise(x, 1, "none", None, 0, backend)
        b = ops.nvfp4_quantise(weight, 16, "none", None, 0, backend)
        times = clock(lambda a=a, b=b: ops.nvfp4_matmul(*a, *b, torch.bfloat16, backend))
        plain = clock(lambda x=x, weight=weight: x @ weight.t())
        yield {
            "op": "product",
            "shape": [tokens, n, k],
            **times,
            "tflop_s": 2 * tokens * n * k / times["median_ms"] / 1e9,
            "bfloat16_ms": plain["median_ms"],
            "against_bfloat16": plain["median_ms"] / times["median_ms"],
        }


def number(name: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A column, empty where a result has no such number."""
    return lambda result: format(result[name], form) if name in result else ""


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--tokens", type=int, default=7040, help="of a chunk: 8 frames of 880")
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    check_backend(options.backend, options.device)
    register_ops()
    clock = Clock(options.device, options.runs)
    sizes = (options.tokens, options.width, options.ffn, options.backend)
    with torch.no_grad():
        results = [*bandwidths(clock, *sizes), *products(clock, *sizes)]
    method = f"{clock.method} {_METHOD}"
    record = make_record(
        "nvfp4",
        f"benchmarks/nvfp4.py {' '.join(sys.argv[1:])}".strip(),
        f"Backend {options.backend}. {method}".replace("\n", " "),
        results,
    )
    text = markdown(
        record,
        "NVFP4 kernels",
        {
            "op": lambda result: result["op"],
            "shape": lambda result: "×".join(map(str, result["shape"])),
            "median ms": number("median_ms", ".4f"),
            "p90 ms": number("p90_ms", ".4f"),
            "GB/s": number("gb_s", ".0f"),
            "copy GB/s": number("copy_gb_s", ".0f"),
            "of copy": number("of_copy", ".0%"),
            "TFLOP/s": number("tflop_s", ".1f"),
            "bfloat16 ms": number("bfloat16_ms", ".4f"),
            "speed-up": number("against_bfloat16", ".2f"),
        },
    )
    write_record(options.output / "nvfp4", record, text)
    print(text)


if __name__ == "__main__":
    main()
