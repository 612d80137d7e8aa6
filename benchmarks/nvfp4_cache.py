"""Measure what the KV cache in NVFP4 costs a stream, to write and to read, beside one in bfloat16.

python benchmarks/nvfp4_cache.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lltk.bench.clock import Clock
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.ops.implementations import find_implementation, implementations, register_ops
from lltk.ops.nvfp4_paged_attention.reference import Pages, empty_pages

_METHOD = """\
Times are of one layer's keys and values together. A commit writes a page of each. A read is
attention to the chunk's own keys and to all listed pages, with whatever gathers or decodes these.
A chunk is every layer's commit and, in {passes} passes, its reads; the column tells how much
longer it takes than with the fastest reader of bfloat16 pages. The last column is that difference
as a share of a chunk's attention and linears in bfloat16, timed alike; these are less than the
whole chunk."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=50)
    made.add_argument("--backend", default="triton", help="what writes NVFP4's pages")
    made.add_argument("--tokens", type=int, default=7040, help="of a chunk: 8 frames of 880")
    made.add_argument("--pages", type=int, default=3, help="listed pages, a chunk each")
    made.add_argument("--heads", type=int, default=24)
    made.add_argument("--head-width", type=int, default=128)
    made.add_argument("--ffn", type=int, default=14336, help="the feed-forward's width")
    made.add_argument("--layers", type=int, default=30)
    made.add_argument("--passes", type=int, default=5, help="of a chunk, its commit included")
    return made


def main() -> None:
    """Measure and write the record."""
    options = script_options(parser())
    register_ops()
    clock = Clock(torch.device(options.device), options.runs)
    with torch.no_grad():
        results = _results(options, clock)
    method = f"{clock.method} {_METHOD.format(passes=options.passes)}"
    record = script_record("nvfp4_cache", method, results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "cache": lambda row: row["cache"],
        "read by": lambda row: row["reader"],
        "commit ms": lambda row: f"{row['commit']['median_ms']:.4f}",
        "read ms": lambda row: f"{row['read']['median_ms']:.4f}",
        "p90": lambda row: f"{row['read']['p90_ms']:.4f}",
        "a chunk more, ms": lambda row: f"{row['more_ms']:+.1f}",
        "of a chunk %": lambda row: f"{row['of_chunk']:+.2f}",
    }
    return markdown(record, "The KV cache in NVFP4", columns)


def _results(options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    rows = list(_rows(options, clock))
    for row in rows:
        row["chunk_ms"] = options.layers * (
            row["commit"]["median_ms"] + options.passes * row["read"]["median_ms"]
        )
    base = min(row["chunk_ms"] for row in rows if row["cache"] == "bfloat16")
    linears = _linears(options, clock)
    whole = base + options.layers * options.passes * linears
    for row in rows:
        row["more_ms"] = row["chunk_ms"] - base
        row["of_chunk"] = 100 * row["more_ms"] / whole
        row["linears_ms"] = linears
    return rows


def _rows(options: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """A row for each cache and each implementation that reads it on this device."""
    size = (1, options.tokens, options.heads, options.head_width)
    q, k, v = (torch.randn(size, dtype=torch.bfloat16, device=clock.device) for _ in range(3))
    slots = options.pages + 1
    table = torch.arange(options.pages, device=clock.device)
    plain = [k.new_zeros(1, slots, *size[1:]) for _ in range(2)]
    caches: list[tuple[str, str, list[Tensor | None], Callable[[Tensor], None]]] = [
        ("bfloat16", "paged_attention", [*plain], partial(_commit, plain, k, v)),
    ]
    for name, smoothing, rule in (
        ("NVFP4", False, "none"),
        ("NVFP4, smoothed", True, "none"),
        ("NVFP4, smoothed, 4/6 mse", True, "mse"),
    ):
        arenas = [empty_pages((1, slots, *size[1:]), smoothing, clock.device) for _ in range(2)]
        writer = find_implementation("nvfp4_write_page", options.backend).load()
        write = partial(_commit_nvfp4, writer, arenas, k, v, rule)
        parts = [part for arena in arenas for part in arena]
        caches.append((name, "nvfp4_paged_attention", parts, write))
    for name, attention, pages, commit in caches:
        for slot in table.split(1):
            commit(slot)
        times = clock(partial(commit, torch.tensor([options.pages], device=clock.device)))
        for choice in implementations(attention).values():
            if choice.name in ("reference", "fp8_decode_torch"):
                continue
            if choice.name == "decode" and clock.cuda:
                continue  # it copies a table from the CPU, which a graph cannot record
            if choice.missing(clock.device) is None:
                read = clock(partial(choice.load(), q, k, v, *pages, table))
                yield {"cache": name, "reader": choice.name, "commit": times, "read": read}


def _commit(arenas: list[Tensor], k: Tensor, v: Tensor, slot: Tensor) -> None:
    for arena, value in zip(arenas, (k, v), strict=True):
        torch.ops.lltk.write_page(arena, value, slot)


def _commit_nvfp4(
    writer: Callable[..., None],
    arenas: list[Pages],
    k: Tensor,
    v: Tensor,
    rule: str,
    slot: Tensor,
) -> None:
    for arena, value in zip(arenas, (k, v), strict=True):
        writer(*arena, value, slot, rule)


def _linears(options: argparse.Namespace, clock: Clock) -> float:
    """Milliseconds of a block's linears: six square ones and the feed-forward's two."""
    width = options.heads * options.head_width
    total = 0.0
    for count, n, k in ((6, width, width), (1, options.ffn, width), (1, width, options.ffn)):
        x, weight = (
            torch.randn(rows, k, dtype=torch.bfloat16, device=clock.device)
            for rows in (options.tokens, n)
        )
        total += count * clock(partial(torch.matmul, x, weight.t()))["median_ms"]
    return total


if __name__ == "__main__":
    main()
