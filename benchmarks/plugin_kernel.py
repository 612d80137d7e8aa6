"""Measure attention kernels that were compiled beforehand beside those of torch and Triton.

python benchmarks/plugin_kernel.py

Kernels are compiled by the Triton that is installed. Those of another machine are measured with

python benchmarks/plugin_kernel.py --compile kernels --sm 90
python benchmarks/plugin_kernel.py --kernels kernels

of which the first, which needs no GPU, compiles and ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lltk.bench.clock import Clock
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.export.kernels import TILES, Sizes, Tiles, write_kernels
from lltk.files.writing import whole_folder
from lltk.ops.implementations import find_implementation, register_ops
from lltk.ops.nvfp4_paged_attention.reference import Pages, empty_pages
from lltk.stream.runtimes.cubin import Kernels

_METHOD = """\
Each attends to a chunk's own keys and to all listed pages in NVFP4, with means; one page is not
listed. A difference is the largest from the reference in float32, over the first and the last
head; values are about 1 in size."""
_OTHERS = ("decode_triton", "fp8_decode")
_HEADS = (0, -1)


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=50)
    made.add_argument("--tokens", type=int, default=7040, help="of a chunk: 8 frames of 880")
    made.add_argument("--pages", type=int, default=4, help="of an arena; all but one are listed")
    made.add_argument("--heads", type=int, default=24)
    made.add_argument("--head-width", type=int, default=128)
    made.add_argument("--sm", type=int, default=90, help="what to compile for (default: 90)")
    made.add_argument(
        "--tiles", action="append", help="M,N,WARPS,STAGES and 1,0 or 1,1 for Hopper's; repeatable"
    )
    made.add_argument("--compile", type=Path, metavar="FOLDER", help="compile into it, and end")
    made.add_argument("--kernels", type=Path, metavar="FOLDER", help="measure those of a folder")
    return made


def main() -> None:
    """Measure and write the record."""
    options = script_options(parser())
    sizes = Sizes(1, options.tokens, options.pages, options.heads, options.head_width, True, True)
    if options.compile:
        _compile(options, sizes, options.compile)
        return
    register_ops()
    clock = Clock(torch.device(options.device), options.runs)
    with torch.no_grad(), TemporaryDirectory() as place:
        folder = options.kernels or Path(place)
        if not options.kernels:
            _compile(options, sizes, folder)
        rows = list(_rows(clock, sizes, folder))
    record = script_record("plugin_kernel", f"{clock.method} {_METHOD}", rows)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "kernels": lambda row: row["name"],
        "median ms": column("median_ms", ".4f"),
        "p90 ms": column("p90_ms", ".4f"),
        "difference": column("difference", ".1e"),
    }
    return markdown(record, "Attention kernels for plugins", columns)


def _compile(options: argparse.Namespace, sizes: Sizes, folder: Path) -> None:
    """A folder of kernels for each way to cut them."""
    wanted = [Tiles(*map(int, each.split(","))) for each in options.tiles or ()]
    for tiles in wanted or [TILES[options.sm]]:
        name = f"{tiles.m}x{tiles.n}-{tiles.warps}-warps-{tiles.stages}-stages"
        name += ("-hopper" if tiles.hopper else "") + ("-turns" if tiles.turns else "")
        with whole_folder(folder / name) as new:
            write_kernels(new, sizes, options.sm, tiles)


def _rows(clock: Clock, sizes: Sizes, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each implementation and each folder of kernels."""
    torch.manual_seed(0)
    own = sizes.contract.inputs["q"].shape
    q, k, v = (torch.randn(own, dtype=torch.bfloat16, device=clock.device) for _ in range(3))
    arenas = [_arena(sizes, clock.device) for _ in range(2)]
    table = torch.arange(sizes.pages - 1, device=clock.device).flip(0)
    listed = torch.arange(sizes.pages, device=clock.device) < sizes.pages - 1
    wanted = _attended("reference", q, k, v, arenas, table)
    for name in _OTHERS:
        choice = find_implementation("nvfp4_paged_attention", name)
        if choice.missing(clock.device) is not None:
            continue
        run = choice.load()
        times = clock(partial(run, q, k, v, *arenas[0], *arenas[1], table))
        found = run(q, k, v, *arenas[0], *arenas[1], table)
        yield {"name": name, **times, "difference": _difference(found, wanted)}
    given = {"q": q, "k": k, "v": v, "listed": listed}
    for name, arena in zip("kv", arenas, strict=True):
        given |= {f"{name}_{part}": each for part, each in arena._asdict().items()}
    for each in sorted(folder.iterdir()):
        kernels = Kernels(each, clock.device)
        times = clock(partial(kernels, given))
        found = kernels(given)["out"]
        yield {"name": f"plugin, {each.name}", **times, "difference": _difference(found, wanted)}


def _arena(sizes: Sizes, device: torch.device) -> Pages:
    """Pages of normal numbers, the last one of NaN."""
    shape = sizes.batch, sizes.pages, sizes.tokens, sizes.heads, sizes.width
    arena = empty_pages(shape, True, device)
    write = find_implementation("nvfp4_write_page", "triton").load()
    for slot in torch.arange(sizes.pages, device=device).split(1):
        page = torch.randn((shape[0], *shape[2:]), dtype=torch.bfloat16, device=device)
        write(*arena, page + 0.5, slot, "none")
    arena.decode_scales[:, -1] = torch.nan
    return arena


def _attended(
    name: str, q: Tensor, k: Tensor, v: Tensor, arenas: list[Pages], table: Tensor
) -> Tensor:
    """The heads that are compared, one by one, because the reference holds all scores."""
    run = find_implementation("nvfp4_paged_attention", name).load()
    results = []
    for head in _HEADS:
        own = [each[:, :, head, None] for each in (q, k, v)]
        parts = []
        for codes, scales, decode_scales, means in arenas:
            assert means is not None
            parts += [codes[:, :, :, head, None], scales[:, :, :, head, None]]
            parts += [decode_scales[:, :, head, None], means[:, :, head, None]]
        results.append(run(*own, *parts, table))
    return torch.cat(results, 2)


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found[:, :, _HEADS].float() - wanted.float()).abs().max())


if __name__ == "__main__":
    main()
