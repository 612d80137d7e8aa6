"""Stream videos of the 5B model from prompts to a file, and time each step towards real time.

    python benchmarks/inference.py
    python benchmarks/inference.py --only BF16 --only "2 steps" --seconds 16
    torchrun --nproc-per-node 2 benchmarks/inference.py

Weights and prompts are random and have the true shapes. A run measures the rows that its processes
and GPUs suffice for: the first command above measures rows of one process, the last those of two.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lltk.bench.random_weights import random_prompts, with_random_models
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.bench.stream import METHOD, measure
from lltk.graph.memory import readable
from lltk.graph.recipe import load_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.parallel.ranks import joined
from lltk.stream.recipe import stream_section
from lltk.streaming import StreamPlan, plan_stream

HERE = Path(__file__).parent
_FP8 = str(HERE / "dit" / "fused.yaml")
_NVFP4 = str(HERE / "inference" / "bfloat16_decoder.yaml")
_FAST = "wan22_5b_stream_fp8"
_SHARED = "wan22_5b_stream_sp2"
_REPLAYED = "stream.decoder.cuda_graphs=true"
_ELSEWHERE = ("stream.decoder.device=cuda:1", _REPLAYED)
_ON_TWO = ("stream.decoder.device=[cuda:1, cuda:2]", _REPLAYED)
_BY_ONE = ("stream.decoder.device=null",)
_WIDE = ("passes.ulysses_stream.exchange=compute",)
_NARROW = ("passes.ulysses_stream.exchange=nvfp4",)
_NARROWEST = (*_NARROW, "passes.ulysses_stream.exchange_queries=fp8")
_BEHIND = ("stream.decoder.device=[cuda:2, cuda:3]", _REPLAYED)
_METHOD = """\
Weights are random and have the true shapes. Random embeddings stand for text, whose encoding does
not count. Where decoding is meanwhile, a chunk is decoded while the next one is made: on a CUDA
stream of the decoder's own or, where the row says so, on a GPU of its own. Where it is in turn,
the next chunk waits for the frames of this one. Either way a chunk is committed while it is
decoded, so on a shared GPU its DiT seconds hold some of the decoder's. The first frame's latency
includes compiling and recording; only a run's first row finds the caches of compiled kernels
empty."""


@dataclass(frozen=True)
class Row:
    """One way to stream.

    Attributes:
        recipe: a file, or a shipped recipe's name.
        changes: overrides of the recipe's keys.
        gpus: how many GPUs the row needs.
        ranks: how many processes share the transformer; torchrun starts them.
        steps: denoising passes of a chunk; None for the recipe's own number.
        in_turn: whether a chunk waits for the frames of the one before.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    gpus: int = 1
    ranks: int = 1
    steps: int | None = None
    in_turn: bool = False


_FOUR = "passes.ulysses_stream.size=4"
ROWS: Mapping[str, Row] = {
    "BF16": Row("wan22_5b_stream", in_turn=True),
    "FP8": Row(_FP8, in_turn=True),
    "+ NVFP4 KV cache": Row(_NVFP4, in_turn=True),
    "+ FP8 decoder": Row(_FAST, in_turn=True),
    "+ async decoding": Row(_FAST),
    "3 steps": Row(_FAST, steps=3),
    "2 steps": Row(_FAST, steps=2),
    "decoder on its own GPU": Row(_FAST, _ELSEWHERE, 2),
    "decoder on its own GPU, 3 steps": Row(_FAST, _ELSEWHERE, 2, steps=3),
    "decoder on its own GPU, 2 steps": Row(_FAST, _ELSEWHERE, 2, steps=2),
    "decoder on two GPUs of its own": Row(_FAST, _ON_TWO, 3),
    "2 ranks": Row(_SHARED, (), 2, 2),
    "2 ranks, 3 steps": Row(_SHARED, (), 2, 2, steps=3),
    "2 ranks, 2 steps": Row(_SHARED, (), 2, 2, steps=2),
    "2 ranks, the first decodes": Row(_SHARED, _BY_ONE, 2, 2),
    "2 ranks, the first decodes, 2 steps": Row(_SHARED, _BY_ONE, 2, 2, steps=2),
    "2 ranks, exchange in bfloat16": Row(_SHARED, _WIDE, 2, 2),
    "2 ranks, exchange in NVFP4": Row(_SHARED, _NARROW, 2, 2),
    "2 ranks, exchange in NVFP4, queries in FP8": Row(_SHARED, _NARROWEST, 2, 2),
    "2 ranks, decoder on two GPUs of its own": Row(_SHARED, _BEHIND, 4, 2),
    "4 ranks": Row(_SHARED, (_FOUR,), 4, 4),
    "4 ranks, 2 steps": Row(_SHARED, (_FOUR,), 4, 4, steps=2),
}


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument("--seconds", type=float, default=64.0, help="of video that a row measures")
    made.add_argument("--warmup", type=int, default=4, help="chunks before these")
    made.add_argument("--only", action="append", choices=ROWS, help="measure this row")
    made.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument("--recipe", help="in place of every row's")
    return made


def rows(options: argparse.Namespace, gpus: int, ranks: int = 1) -> list[str]:
    """The names of the rows that a command makes on a machine with that many GPUs."""
    wanted = options.only or ROWS
    return [n for n, row in ROWS.items() if n in wanted and row.gpus <= gpus and row.ranks == ranks]


def main() -> None:
    """Measure, and write the record again after each row."""
    options = script_options(parser())
    gpus = len(ROWS) if options.device == "cpu" else torch.cuda.device_count()
    results: list[dict[str, Any]] = []
    with joined(options.device) as ranks:
        planned = _Planned(options, ranks.device)
        names = rows(options, gpus, ranks.size)
        if missing := set(options.only or names) - set(names):
            parser().error(
                f"--only: {', '.join(missing)}: not made by {ranks.size} ranks, {gpus} GPUs"
            )
        for name in names:
            result = planned.measured(ROWS[name])
            if ranks.rank == 0:
                results.append({"name": name, "gpus": ROWS[name].gpus, **result})
                print(name, result["e2e_seconds"], result["dit_fps"], flush=True)
                record = script_record("inference", f"{METHOD} {_METHOD}", results, ranks.size)
                write_record(options.output, record, text(record))


class _Planned:
    """Measures rows with random weights; rows that differ only in their steps share the models."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options = options
        self._device = device
        self._made: tuple[tuple[str, ...], StreamPlan] | None = None

    def measured(self, row: Row) -> dict[str, Any]:
        """A row's result."""
        options, plan = self._options, self._plan(row)
        gc.collect()
        torch.cuda.empty_cache()
        for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            torch.cuda.reset_peak_memory_stats(index)
        prompts = random_prompts(plan)
        return measure(plan, options.seconds, options.warmup, 1, prompts, row.in_turn)

    def _plan(self, row: Row) -> StreamPlan:
        file = find_recipe(self._options.recipe or row.recipe)
        steps = () if row.steps is None else (f"stream.steps={row.steps}",)
        recipe = load_recipe(file, (*row.changes, *steps, *self._options.overrides))
        key = (str(file), *row.changes)
        if self._made is None or self._made[0] != key:
            self._made = None
            plan = plan_stream(recipe, self._device, weights=False)
            self._made = key, with_random_models(plan)
        section = stream_section(recipe.stream, str(file))
        return replace(self._made[1], recipe=recipe, section=section)


def text(record: Record) -> str:
    """The record as Markdown."""

    def seconds(n: int) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: (
            f"{row['e2e_seconds'][str(n)]:.1f}" if str(n) in row["e2e_seconds"] else "–"
        )

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "": lambda row: row["name"],
        "GPUs": lambda row: str(row["gpus"]),
        "steps": lambda row: str(row["steps"]),
        "decoding": lambda row: "in turn" if row.get("in_turn") else "meanwhile",
        "DiT FPS": lambda row: f"{row['dit_fps']:.1f}",
        "decode FPS": lambda row: f"{row['decode_fps']:.1f}",
        "E2E FPS": lambda row: f"{row['e2e_fps']:.1f}",
        **{f"{n} s": seconds(n) for n in (16, 32, 64)},
        "first frame s": lambda row: f"{row['first_frame_seconds']:.1f}",
        "peak memory": lambda row: _peaks(row["memory"]["peak"]),
        "planned": lambda row: _owners(row["memory"]["planned"]),
        "ran": lambda row: row["ran"]["transformer"] + "; decoder " + row["ran"]["decoder"],
    }
    return markdown(record, "Inference", columns)


def _peaks(peak: Mapping[str, int]) -> str:
    return ", ".join(f"{owner} {readable(size)}" for owner, size in peak.items() if size)


def _owners(planned: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{device}: " + ", ".join(f"{owner} {readable(size)}" for owner, size in owners.items())
        for device, owners in planned.items()
    )


if __name__ == "__main__":
    main()
