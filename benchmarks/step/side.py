"""The process of `benchmarks/step.py` that times one recipe of one checkout.

It answers ``step`` and ``commit`` by a pass's times, ``products`` by `lltk.bench.ceiling`'s, and
``about`` by what else a row says. It imports only what both checkouts have, and takes one argument:
its options as JSON.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lltk.bench.ceiling import ceiling
from lltk.bench.profiling import timed
from lltk.bench.random_weights import with_random_weights
from lltk.bench.record import commit
from lltk.compiler import transform
from lltk.graph.module import instantiate
from lltk.graph.recipe import load_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.stream.recipe import stream_section


@torch.no_grad()
def main() -> None:
    """Answer until there are no more questions."""
    options = json.loads(sys.argv[1])
    device, runs = torch.device(options["device"]), options["runs"]
    recipe = load_recipe(find_recipe(options["recipe"]))
    section = stream_section(recipe.stream, "recipe")
    program = with_random_weights(transform(recipe, weights=False), device)
    module = instantiate(program, device)
    if section.compile:
        module.compile_blocks()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    make = runpy.run_path(str(Path(__file__).parents[1] / "dit.py"))["Passes"]
    passes = make(program, module, device, section.cuda_graphs)
    passes.fill()

    def about() -> dict[str, Any]:
        output = passes.step().float().cpu().numpy().tobytes()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return {
            "checkout": commit(),
            "frames": program.geometry.chunk * program.spec.stride[0],
            "peak_bytes": peak,
            "output": hashlib.sha256(output).hexdigest()[:12],
            "ran": dict(program.implementations),
        }

    answers: dict[str, Callable[[], Any]] = {
        "about": about,
        "step": lambda: timed(passes.step, device, runs),
        "commit": lambda: timed(passes.commit, device, runs),
        "products": lambda: ceiling(program, "step", device, runs),
    }
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
