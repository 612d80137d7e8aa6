"""Kernels of row_pipeline beside those of the ops that it replaced, in turns in one run.

    git worktree add .old 9d6ff22
    python benchmarks/row_kernels.py --old .old --runs 50

9d6ff22 is the last commit that has an op and a kernel for each combination of steps. Each checkout
runs in a process of its own, and one waits while the other measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.bench.sides import Ask, in_turns, side

_METHOD = """\
Milliseconds of {runs} runs after one warm-up: CUDA events around a graph's replay, caches cold.
Old and new measure in turns, {rounds} rounds each. A side's median and 90th percentile are of the
round whose median is the middle one, and its range is that of its rounds' medians. Host is the
microseconds that Python and the driver take to launch a call. Same says whether all results have
the same bits. Rows are {tokens} tokens in bfloat16, with modulations of {frames} frames. Old is
commit 9d6ff22."""


def compared(label: str, old: Ask, new: Ask, rounds: int) -> dict[str, Any]:
    """A case's row."""
    timed = in_turns({"old": partial(old, label), "new": partial(new, label)}, rounds)
    row: dict[str, Any] = {"steps": label}
    for name, found in timed.items():
        middle = found[len(found) // 2]
        row |= {f"{name}_{key}": middle[key] for key in ("median_ms", "p90_ms", "host_us")}
        row[f"{name}_range_ms"] = [found[0]["median_ms"], found[-1]["median_ms"]]
    row["against_old"] = row["new_median_ms"] / row["old_median_ms"]
    row["same"] = timed["old"][0]["digests"] == timed["new"][0]["digests"]
    return row


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = script_parser(__file__, __doc__, runs=50)
    made.add_argument("--old", type=Path, required=True, help="a checkout of 9d6ff22")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--calls", type=int, default=200, help="launches that are timed on the host")
    made.add_argument("--implementation", default="triton", help="of every op")
    made.add_argument("--frames", type=int, default=8, help="latent frames of a chunk")
    made.add_argument("--tokens", type=int, default=7040, help="of a chunk: 8 frames of 880")
    made.add_argument("--heads", type=int, default=24, help="heads of 128 channels")
    made.add_argument("--ffn", type=int, default=14336, help="the feed-forward's width")
    return made


def main() -> None:
    """Measure and write the record."""
    options = script_options(parser())
    own = ("old", "output", "overwrite", "rounds")
    shared = {k: v for k, v in vars(options).items() if k not in own}
    here = Path(__file__).resolve()
    script = here.parent / "row_kernels" / "side.py"
    with (
        side(script, options.old, {**shared, "old": True}) as old,
        side(script, here.parents[1], {**shared, "old": False}) as new,
    ):
        labels = new("labels")
        results = [compared(label, old, new, options.rounds) for label in labels]
    method = f"Implementation {options.implementation}. {_METHOD.format(**vars(options))}"
    record = script_record("row_kernels", method, results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""

    def span(name: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: " to ".join(f"{ms:.4f}" for ms in row[name])

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "steps": lambda row: row["steps"],
        "old: median ms": column("old_median_ms", ".4f"),
        "old: p90": column("old_p90_ms", ".4f"),
        "old: range": span("old_range_ms"),
        "new: median ms": column("new_median_ms", ".4f"),
        "new: p90": column("new_p90_ms", ".4f"),
        "new: range": span("new_range_ms"),
        "new / old": column("against_old", ".3f"),
        "old: host µs": column("old_host_us", ".0f"),
        "new: host µs": column("new_host_us", ".0f"),
        "same": lambda row: "yes" if row["same"] else "no",
    }
    return markdown(record, "Kernels of rows, old and new", columns)


if __name__ == "__main__":
    main()
