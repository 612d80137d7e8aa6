"""A stream of the 5B model from prompts to a file: what each step to real time gains.

    .venv/bin/python benchmarks/inference.py [--seconds 64] [--only NAME …]

Weights and prompts are random, at the true shape. Writes inference.json and inference.md beside
this file, or into --output.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lltk.bench.random_weights import random_prompts, with_random_models
from lltk.bench.record import make_record, markdown, write_record
from lltk.bench.stream import METHOD, measure
from lltk.cli.recipes import find_recipe
from lltk.graph.memory import readable
from lltk.graph.recipe import load_recipe
from lltk.streaming import plan_stream

HERE = Path(__file__).parent
_NVFP4 = str(HERE / "dit" / "nvfp4_cache.yaml")
_ELSEWHERE = "stream.decoder.device=cuda:1"
_METHOD = """\
Random weights of the true shape, random embeddings in place of text, whose encoding does not count.
The decoder works while the next chunk is made, on a CUDA stream of its own or, where it says so, on
a GPU of its own. First frame: compilation and recording in it, caches cold in the first row alone.
"""
Row = tuple[str, str, tuple[str, ...], int]
"""A name, a recipe, its overrides, and how many GPUs it needs."""
ROWS: tuple[Row, ...] = (
    ("BF16", "wan22_5b_stream", (), 1),
    ("FP8", "wan22_5b_stream_fp8", (), 1),
    ("+ NVFP4 KV cache", _NVFP4, (), 1),
    ("3 steps", _NVFP4, ("stream.steps=3",), 1),
    ("2 steps", _NVFP4, ("stream.steps=2",), 1),
    ("+ decoder on its own GPU", _NVFP4, (_ELSEWHERE,), 2),
    ("both, 3 steps", _NVFP4, (_ELSEWHERE, "stream.steps=3"), 2),
    ("both, 2 steps", _NVFP4, (_ELSEWHERE, "stream.steps=2"), 2),
)


def main() -> None:
    """Measure and write the record, anew after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=64.0, help="of video, a row")
    parser.add_argument("--warmup", type=int, default=4, help="chunks before")
    parser.add_argument("--only", action="append", choices=[row[0] for row in ROWS])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--recipe", help="in place of every row's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    results: list[dict[str, Any]] = []
    for name, recipe, changes, needed in ROWS:
        wanted = options.only is None or name in options.only
        if wanted and (needed <= gpus or options.device == "cpu"):
            given = (*changes[: 0 if options.device != "cuda" else None], *options.overrides)
            results.append({"name": name, **_row(options, options.recipe or recipe, given)})
            print(name, results[-1]["e2e_seconds"], results[-1]["dit_fps"], flush=True)
            _write(options.output, results)


def _row(options: argparse.Namespace, recipe: str, changes: tuple[str, ...]) -> dict[str, Any]:
    gc.collect()
    for index in range(torch.cuda.device_count()):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(index)
    plan = plan_stream(load_recipe(find_recipe(recipe), changes), options.device, weights=False)
    plan = with_random_models(plan)
    return measure(plan, options.seconds, options.warmup, 1, random_prompts(plan))


def _write(folder: Path, results: list[dict[str, Any]]) -> None:
    command = f"benchmarks/inference.py {' '.join(sys.argv[1:])}".strip()
    method = f"{METHOD} {_METHOD}".replace("\n", " ").strip()
    record = make_record("inference", command, method, results)

    def seconds(n: int) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: (
            f"{row['e2e_seconds'][str(n)]:.1f}" if str(n) in row["e2e_seconds"] else "–"
        )

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "": lambda row: row["name"],
        "steps": lambda row: str(row["steps"]),
        "DiT FPS": lambda row: f"{row['dit_fps']:.1f}",
        "decode FPS": lambda row: f"{row['decode_fps']:.1f}",
        "E2E FPS": lambda row: f"{row['e2e_fps']:.1f}",
        **{f"{n} s": seconds(n) for n in (16, 32, 64)},
        "first frame s": lambda row: f"{row['first_frame_seconds']:.1f}",
        "peak memory": lambda row: _peaks(row["memory"]["peak"]),
        "planned": lambda row: _owners(row["memory"]["planned"]),
        "ran": lambda row: row["ran"]["transformer"] + "; decoder " + row["ran"]["decoder"],
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
