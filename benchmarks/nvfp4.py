"""Measure the bandwidth of NVFP4's kernels and the speed of its products, on one device.

python benchmarks/nvfp4.py
python benchmarks/nvfp4.py --backend reference --device cpu --tokens 64 --width 48 --ffn 64
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lltk.bench.clock import Clock, size_of
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import KERNEL_COLUMNS, column, script_options, script_parser, script_record
from lltk.ops.hadamard.reference import SIGNS
from lltk.ops.implementations import check_device, preferred

_METHOD = """\
Bytes are what a kernel reads and writes of its operands and results. Quantising reads its input
twice, the first time for the largest magnitude; the record's "once" counts every operand and
result once. GB/s and its share of a copy's follow from bytes; the copy moves as many and is timed
alike. Products are compared with torch.matmul of bfloat16 operands of the same shape."""


_OPS = (
    "nvfp4_quantise",
    "row_pipeline",
    "nvfp4_quantise_transposed",
    "nvfp4_dequantise",
    "nvfp4_transpose",
    "nvfp4_matmul",
    "hadamard",
)
Ops = SimpleNamespace
"""An implementation of each, by the op's name."""


def bandwidths(
    clock: Clock, tokens: int, width: int, ffn: int, ops: Ops
) -> Iterator[dict[str, Any]]:
    """The ops whose speed memory bounds, each beside a copy of as many bytes."""
    device = clock.device
    seed = torch.tensor([1, 2], device=device)
    signs = list(SIGNS)
    weight = torch.randn(ffn, width, device=device, dtype=torch.bfloat16)

    def row(
        op: str, operands: tuple[Tensor, ...], call: Callable[[], Any], reads: int = 1
    ) -> dict[str, Any]:
        written = size_of(call())
        return {
            "op": op,
            "shape": list(operands[0].shape),
            "once": size_of(operands) + written,
            **clock.beside_copy(call, reads * size_of(operands) + written),
        }

    for columns in (width, ffn):
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
        quantised = ops.nvfp4_quantise(x, 1, "none", None, 0)
        yield row(
            "quantise",
            (x,),
            lambda x=x: ops.nvfp4_quantise(x, 1, "none", None, 0),
            reads=2,
        )
        yield row(
            "dequantise to bfloat16",
            quantised,
            lambda q=quantised: ops.nvfp4_dequantise(*q, torch.bfloat16),
        )
    for name, rule, random in (
        ("quantise, stochastic", "none", seed),
        ("quantise, 4/6 mse", "mse", None),
        ("quantise, 4/6 abs_max", "abs_max", None),
    ):
        yield row(
            name,
            (x,),
            lambda rule=rule, random=random: ops.nvfp4_quantise(x, 1, rule, random, 0),
            reads=2,
        )
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    scale, shift = torch.randn(2, 1, width, device=device).unbind()

    def in_two() -> Any:
        made = F.layer_norm(hidden.float(), (width,), eps=1e-6) * scale + shift
        return ops.nvfp4_quantise(made.to(hidden.dtype), 1, "none", None, 0)

    yield row(
        "norm + modulate + quantise, fused",
        (hidden,),
        lambda: ops.row_pipeline(hidden, scale=scale, shift=shift, eps=1e-6, to="nvfp4"),
        reads=2,
    )
    yield row("norm + modulate + quantise, torch and quantise", (hidden,), in_two, reads=2)
    yield row(
        "quantise, 16×16",
        (weight,),
        lambda: ops.nvfp4_quantise(weight, 16, "none", None, 0),
        reads=2,
    )
    codes, scales, _ = ops.nvfp4_quantise(weight, 16, "none", None, 0)
    yield row("transpose codes", (codes, scales), lambda: ops.nvfp4_transpose(codes, scales))
    yield row("Hadamard", (x,), lambda: ops.hadamard(x, signs))
    for name, random in (("", None), (", stochastic", seed)):
        yield row(
            f"Hadamard + quantise + transpose, fused{name}",
            (x,),
            lambda random=random: ops.nvfp4_quantise_transposed(x, signs, "none", random, 0),
            reads=2,
        )

    def unfused() -> Any:
        turned = ops.hadamard(x.t().contiguous(), signs)
        return ops.nvfp4_quantise(turned, 1, "none", None, 0)

    if tokens % len(signs) == 0:
        yield row("Hadamard + quantise + transpose, in three", (x,), unfused, reads=2)


def products(clock: Clock, tokens: int, width: int, ffn: int, ops: Ops) -> Iterator[dict[str, Any]]:
    """The products of attention's linears and the feed-forward's, beside those in bfloat16."""
    for n, k in ((width, width), (ffn, width), (width, ffn)):
        x, weight = (
            torch.randn(rows, k, device=clock.device, dtype=torch.bfloat16) for rows in (tokens, n)
        )
        a = ops.nvfp4_quantise(x, 1, "none", None, 0)
        b = ops.nvfp4_quantise(weight, 16, "none", None, 0)
        times = clock(lambda a=a, b=b: ops.nvfp4_matmul(*a, *b, torch.bfloat16))
        plain = clock(lambda x=x, weight=weight: x @ weight.t())
        yield {
            "op": "product",
            "shape": [tokens, n, k],
            **times,
            "tflop_s": 2 * tokens * n * k / times["median_ms"] / 1e9,
            "bfloat16_ms": plain["median_ms"],
            "against_bfloat16": plain["median_ms"] / times["median_ms"],
        }


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=50)
    made.add_argument("--backend", default="triton", help="what runs each op that has it")
    made.add_argument("--tokens", type=int, default=7040, help="of a chunk: 8 frames of 880")
    made.add_argument("--width", type=int, default=3072)
    made.add_argument("--ffn", type=int, default=14336, help="the feed-forward's width")
    return made


def main() -> None:
    """Measure and write the record."""
    options = script_options(parser())
    device = torch.device(options.device)
    chosen = {op: preferred(op, (options.backend, "triton")) for op in _OPS}
    check_device({op: each.name for op, each in chosen.items()}, device)
    ops = SimpleNamespace(**{op: each.load() for op, each in chosen.items()})
    clock = Clock(device, options.runs)
    sizes = (options.tokens, options.width, options.ffn, ops)
    with torch.no_grad():
        results = [*bandwidths(clock, *sizes), *products(clock, *sizes)]
    record = script_record("nvfp4", f"Backend {options.backend}. {clock.method} {_METHOD}", results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        **KERNEL_COLUMNS,
        "copy GB/s": column("copy_gb_s", ".0f"),
        "of copy": column("of_copy", ".0%"),
        "TFLOP/s": column("tflop_s", ".1f"),
        "bfloat16 ms": column("bfloat16_ms", ".4f"),
        "speed-up": column("against_bfloat16", ".2f"),
    }
    return markdown(record, "NVFP4 kernels", columns)


if __name__ == "__main__":
    main()
