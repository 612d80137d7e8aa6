"""Stream videos of the 5B model from prompts to a file, and time each step towards real time.

    python benchmarks/inference.py
    python benchmarks/inference.py --only BF16 --only "2 steps" --seconds 16
    torchrun --nproc-per-node 2 benchmarks/inference.py

Weights and prompts are random and have the true shapes. The first command measures every row that
the GPUs suffice for, and starts the processes that rows of several ranks need. The last one, which
it uses for that, measures the rows of two ranks alone.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lltk.bench.random_weights import random_prompts, with_random_models
from lltk.bench.record import Record, markdown, record_files, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.bench.stream import METHOD, latency, measure
from lltk.graph.memory import readable
from lltk.graph.recipe import load_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.parallel.ranks import Ranks, joined, launched
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


def rows(options: argparse.Namespace, gpus: int, ranks: int | None = None) -> list[str]:
    """The names of the rows that a command makes on a machine with that many GPUs.

    Args:
        options: the command's.
        gpus: how many there are.
        ranks: how many processes torchrun started; None if it started none.
    """
    wanted = options.only or ROWS
    return [
        name
        for name, row in ROWS.items()
        if name in wanted and row.gpus <= gpus and ranks in (None, row.ranks)
    ]


def main() -> None:
    """Measure, and write the record again after each row."""
    options = script_options(parser())
    gpus = len(ROWS) if options.device == "cpu" else torch.cuda.device_count()
    with joined(options.device) as ranks:
        names = rows(options, gpus, ranks.size if launched() else None)
        if missing := set(options.only or names) - set(names):
            parser().error(f"--only: {', '.join(missing)}: not made by this command on {gpus} GPUs")
        results: list[dict[str, Any]] = []
        for result in _results(options, names, ranks):
            if ranks.rank == 0:
                results.append(result)
                print(result["name"], result["e2e_seconds"], result["dit_fps"], flush=True)
                record = script_record("inference", f"{METHOD} {_METHOD}", results, ranks.size)
                write_record(options.output, record, text(record))


def _results(
    options: argparse.Namespace, names: Sequence[str], ranks: Ranks
) -> Iterator[dict[str, Any]]:
    """The rows' results: those of this process's ranks, then those that need more."""
    planned = _Planned(options, ranks.device)
    for name in names:
        if ROWS[name].ranks == ranks.size:
            yield {"name": name, "gpus": ROWS[name].gpus, **planned.measured(ROWS[name])}
    del planned
    _free()
    for size in sorted({ROWS[name].ranks for name in names} - {ranks.size}):
        yield from _started(size, [name for name in names if ROWS[name].ranks == size])


def _started(size: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Results of rows that so many processes measure, which torchrun starts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    only = [word for name in names for word in ("--only", name)]
    with TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        words = [*_without_rows(sys.argv), *only, "-o", str(made)]
        if subprocess.run([*torchrun, "--nproc-per-node", str(size), *words]).returncode:
            raise SystemExit(f"the rows of {size} ranks failed; their messages are above")
        yield from Record.model_validate_json(record_files(made)[0].read_text()).results


def _without_rows(words: Sequence[str]) -> list[str]:
    """A command's words without the rows that it names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--only", action="append")
    return parser.parse_known_args(words)[1]


def _free() -> None:
    """Leave the GPUs to other processes, as far as this one can."""
    gc.collect()
    torch.cuda.empty_cache()


class _Planned:
    """Measures rows with random weights; rows that differ only in their steps share the models."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options = options
        self._device = device
        self._made: tuple[tuple[str, ...], StreamPlan] | None = None

    def measured(self, row: Row) -> dict[str, Any]:
        """A row's result."""
        options, plan = self._options, self._plan(row)
        _free()
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
        "latency s": latency,
        "switch to frame s": _switched,
        "peak memory": lambda row: _peaks(row["memory"]["peak"]),
        "planned": lambda row: _owners(row["memory"]["planned"]),
        "ran": lambda row: row["ran"]["transformer"] + "; decoder " + row["ran"]["decoder"],
    }
    return markdown(record, "Inference", columns)


def _switched(row: Mapping[str, Any]) -> str:
    """From a switch at the end of a chunk, and from one at its beginning."""
    if "latency_seconds" not in row:
        return "–"
    soonest = row["latency_seconds"]["p50"]
    return f"{soonest:.2f} to {soonest + row['chunk_seconds']['p50']:.2f}"


def _peaks(peak: Mapping[str, int]) -> str:
    return ", ".join(f"{owner} {readable(size)}" for owner, size in peak.items() if size)


def _owners(planned: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{device}: " + ", ".join(f"{owner} {readable(size)}" for owner, size in owners.items())
        for device, owners in planned.items()
    )


if __name__ == "__main__":
    main()
