"""A stream of the 5B model from prompts to a file: what each step to real time gains.

    .venv/bin/python benchmarks/inference.py [--seconds 64] [--only NAME …]
    .venv/bin/torchrun --nproc-per-node 2 benchmarks/inference.py

Weights and prompts are random, at the true shape. Writes inference.json and inference.md beside
this file, or into --output; rows of the record there that were measured on other GPUs, or that are
not measured now, stay in it.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lltk.bench.random_weights import random_prompts, with_random_models
from lltk.bench.record import Record, commit, hardware, make_record, markdown, write_record
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
_BEHIND = ("stream.decoder.device=[cuda:2, cuda:3]", _REPLAYED)
_METHOD = """\
Random weights of the true shape, random embeddings in place of text, whose encoding does not count.
Decoding: meanwhile the next chunk is made, on a CUDA stream of the decoder's own or, where it says
so, on a GPU of its own; or in turn, the next chunk waiting for the frames of this one. Either way a
chunk is committed while it is decoded: on a shared GPU its DiT seconds hold some of the decoder's.
First frame: compilation and recording in it, caches cold in a run's first row alone. Each row's run
has a commit."""


@dataclass(frozen=True)
class Row:
    """One way to stream.

    Attributes:
        recipe: a file, or a shipped recipe's name.
        changes: of it.
        gpus: that it needs.
        ranks: processes that share it, started by torchrun.
        steps: denoising passes a chunk; None for the recipe's.
        in_turn: whether chunks wait for the frames of the one before.
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
    "2 ranks, 2 steps": Row(_SHARED, (), 2, 2, steps=2),
    "2 ranks, decoder on two GPUs of its own": Row(_SHARED, _BEHIND, 4, 2),
    "4 ranks": Row(_SHARED, (_FOUR,), 4, 4),
    "4 ranks, 2 steps": Row(_SHARED, (_FOUR,), 4, 4, steps=2),
}


def main() -> None:
    """Measure and write the record, anew after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=64.0, help="of video, a row")
    parser.add_argument("--warmup", type=int, default=4, help="chunks before")
    parser.add_argument("--only", action="append", choices=ROWS)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--recipe", help="in place of every row's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    gpus = len(ROWS) if options.device == "cpu" else torch.cuda.device_count()
    results: list[dict[str, Any]] = []
    with joined(options.device) as ranks:
        planned = _Planned(options, ranks.device)
        for name, row in ROWS.items():
            wanted = options.only is None or name in options.only
            if not wanted or row.gpus > gpus or row.ranks != ranks.size:
                continue
            result = planned.measured(row)
            if ranks.rank == 0:
                on = " + ".join(_counted(hardware().gpus[: row.gpus])) or "CPU"
                results.append({"name": name, "on": on, "commit": commit(), **result})
                print(name, result["e2e_seconds"], result["dit_fps"], flush=True)
                _write(options.output, results)


class _Planned:
    """Measures rows with random weights; those of one plan but for the steps share it."""

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


def _counted(gpus: Sequence[str]) -> list[str]:
    """Such as 2× NVIDIA H200."""
    return [f"{count}× {name}" for name, count in Counter(gpus).items()]


def _with_others(path: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results, and what a record has of other rows and other GPUs; in the table's order."""
    if path.exists():
        measured = {(row["name"], row["on"]) for row in results}
        held = Record.model_validate_json(path.read_text()).results
        results = [*results, *(row for row in held if (row["name"], row["on"]) not in measured)]
    return sorted(results, key=lambda row: (row["on"], list(ROWS).index(row["name"])))


def _write(folder: Path, results: list[dict[str, Any]]) -> None:
    results = _with_others(folder / "inference.json", results)
    command = f"benchmarks/inference.py {' '.join(sys.argv[1:])}".strip()
    method = f"{METHOD} {_METHOD}".replace("\n", " ").strip()
    record = make_record("inference", command, method, results)

    def seconds(n: int) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: (
            f"{row['e2e_seconds'][str(n)]:.1f}" if str(n) in row["e2e_seconds"] else "–"
        )

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "on": lambda row: row["on"],
        "": lambda row: row["name"],
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
        "commit": lambda row: row["commit"],
    }
    write_record(folder / "inference", record, markdown(record, "Inference", columns))


def _peaks(peak: Mapping[str, int]) -> str:
    return ", ".join(f"{owner} {readable(size)}" for owner, size in peak.items() if size)


def _owners(planned: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{device}: " + ", ".join(f"{owner} {readable(size)}" for owner, size in owners.items())
        for device, owners in planned.items()
    )


if __name__ == "__main__":
    main()
