"""``lltk compare``."""

from __future__ import annotations

import shlex
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from lltk.cli.logs import hide_loading
from lltk.cli.tables import row_table
from lltk.graph.recipe_files import find_recipe
from lltk.parallel.devices import find_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Executor

    from torch import Tensor

    from lltk.graph.geometry import Geometry
    from lltk.models.tiny.world import Story
    from lltk.streaming import StreamPlan

_SEED = 30_000
_SHOTS = 3
_CHUNKS = 6
"""Of a shot."""
_LONG_CHUNKS = 80
"""Of a single shot of 60 s."""


@click.command("compare")
@click.argument("recipes", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Record, without suffix.")
@click.option(
    "--shots", type=click.IntRange(0), default=30, show_default=True,
    help="Shots of the tiny world to score, a recipe; 0 for errors alone.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.IntRange(0), default=0, show_default=True,
    help="Single shots of 60 s whose identity to follow, a recipe.",
)  # fmt: skip
@click.option(
    "--at-once", type=click.IntRange(1), default=128, show_default=True,
    help="Videos streamed at once; short ones have three shots.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True,
              help="Processes that score.")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Override a key of every recipe.")  # fmt: skip
@click.option("--device", help="Where it runs (default: a GPU if there is one).")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("--dry-run", is_flag=True, help="Show the plan; compare nothing.")
def command(
    recipes: tuple[str, ...],
    output: Path | None,
    shots: int,
    minutes: int,
    at_once: int,
    workers: int,
    overrides: tuple[str, ...],
    device: str | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Compare stream RECIPES of one model and geometry with the first of them.

    Tells each block's and the output's relative error, and on the tiny world the share of shots
    that show their caption and what identity they keep, with 95 % confidence intervals. With
    --shots 0 it tells errors alone, of any model, and decodes nothing.

    \b
    Example:
      lltk compare tiny_stream tiny_stream_nvfp4 --shots 60
      lltk compare tiny_stream tiny_stream_nvfp4 --shots 1008 --device cuda -o benchmarks/nvfp4
      lltk compare wan22_5b_stream wan22_5b_stream_nvfp4_cache --shots 0 --device cuda
    """
    if len(recipes) < 2:
        raise ValueError("RECIPES: name at least two; the first is what others are compared with")
    console = Console(quiet=as_json)
    paths = [find_recipe(recipe) for recipe in recipes]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import torch

    from lltk.bench.agreement import one_ahead
    from lltk.bench.compare import minute_row, quality_row, text
    from lltk.bench.record import make_record, write_record
    from lltk.cli.outputs import check_writable, share_cores
    from lltk.graph.recipe import load_recipe
    from lltk.ops.implementations import check_device
    from lltk.streaming import plan_stream

    if output is not None:
        check_writable(output.with_name(output.name + suffix) for suffix in (".json", ".md"))
    chosen = find_device(device)
    hide_loading()
    films = -(-shots // _SHOTS)
    batch = min(max(films, minutes, 1), at_once)
    sizes = (*overrides, f"geometry.batch={batch}")
    loaded = [(path.stem, load_recipe(path, sizes)) for path in paths]
    _check_same("geometry", [(name, recipe.geometry.model_dump()) for name, recipe in loaded])
    if films or minutes:
        _check_size(loaded[0][1].geometry)
    plans = []
    for name, recipe in loaded:
        with console.status(f"compiling {name}"):
            plan = plan_stream(recipe, chosen, weights=not dry_run)
        console.print(f"{name}: {plan.describe()['transformer']}", highlight=False)
        plans.append((name, plan))
        configs = [(name, plan.transformer.recipe["model"]["config"]) for name, plan in plans]
        _check_same("model.config", configs)
    if dry_run:
        console.print(
            f"Plan: errors over {_SHOTS * _CHUNKS} chunks, {films * _SHOTS} shots and {minutes} "
            f"minutes a recipe, {batch} videos at once"
        )
        return
    for _, plan in plans:
        check_device(plan.transformer.implementations, chosen)
    share_cores(chosen)
    base = plans[0][1]
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:

        def measured() -> Iterator[Callable[[], dict[str, Any]]]:
            for name, plan in plans:
                with console.status(f"comparing {name}"):
                    row = _measure(name, base, plan, films, minutes, pool)
                yield row

        results = [row() for row in one_ahead(measured())]
    line = ["lltk", "compare", *recipes, "--shots", str(shots), "--minutes", str(minutes)]
    line += ["--at-once", str(at_once), "--device", str(chosen)]
    line += [part for change in overrides for part in ("--set", change)]
    method = (
        "Relative errors over the denoising passes of a video, both models seeing the latents that "
        f"the first makes ({paths[0].stem}). Captions drawn with a fixed seed, the same for all"
    )
    scores = "; agreement and identity as benchmarks/quality.py has them, 95 % intervals"
    method += scores + "." if films or minutes else "."
    record = make_record("compare", shlex.join(line), method, results)
    if output is not None:
        write_record(output, record, text(record))
    if as_json:
        click.echo(record.model_dump_json(indent=2))
    console.print(row_table("Relative error", [_error_row(row) for row in results]))
    if films:
        console.print(row_table("Tiny world", [quality_row(row, results[0]) for row in results]))
    if minutes:
        console.print(row_table("Single shots of 60 s", [minute_row(row) for row in results]))


def _check_same(what: str, recipes: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse recipes that have not the first one's values; ``what`` they are is said."""
    first, wanted = recipes[0]
    for name, found in recipes[1:]:
        differing = [
            f"{key} ({found.get(key)}, not {wanted.get(key)})"
            for key in {**wanted, **found}
            if found.get(key) != wanted.get(key)
        ]
        if differing:
            raise ValueError(
                f"{name}: {what}: differs from {first}'s in {', '.join(differing)}; name "
                "recipes of one model and geometry"
            )


def _check_size(geometry: Geometry) -> None:
    """Refuse frames that the scorer cannot read."""
    from lltk.models.tiny.world import RESOLUTION

    if (geometry.height, geometry.width) != (RESOLUTION, RESOLUTION):
        raise ValueError(
            f"geometry: frames of {geometry.width}×{geometry.height} are not the tiny world's, "
            f"{RESOLUTION}×{RESOLUTION}, and cannot be scored; compare errors alone: --shots 0 "
            "--minutes 0"
        )


def _measure(
    name: str, base: StreamPlan, plan: StreamPlan, films: int, minutes: int, pool: Executor
) -> Callable[[], dict[str, Any]]:
    """Errors against the base, and what the recipe's own videos show, once they are scored."""
    from dataclasses import asdict

    from lltk.bench.agreement import encoded, lasting, scored, summarise
    from lltk.bench.compare import layer_errors
    from lltk.bench.quality import draw_stories
    from lltk.graph.module import instantiate

    geometry, steps = plan.transformer.geometry, plan.section.steps
    stories = draw_stories(_SEED, max(films, 1), _SHOTS, _CHUNKS, geometry.chunk)
    pairs = [(p.transformer, instantiate(p.transformer, p.device)) for p in (base, plan)]
    text = encoded(base, _filled(stories, geometry.batch))
    errors = layer_errors(pairs[0], pairs[1], text, steps, _SEED)
    del pairs
    scores = [scored(pool, made, some) for made, some in _films(plan, stories[:films])]
    long = draw_stories(_SEED + 1, minutes, 1, _LONG_CHUNKS, geometry.chunk)
    kept = lasting(pool, [film for made, _ in _films(plan, long) for film in made])

    def row() -> dict[str, Any]:
        found = {
            "name": name,
            "errors": errors,
            "ran": plan.transformer.implementations,
            "recipe": plan.transformer.recipe["passes"],
        }
        if films:
            found |= asdict(summarise([score for some in scores for score in some()]))
        if minutes:
            found["minute"] = asdict(kept())
        return found

    return row


def _films(
    plan: StreamPlan, stories: Sequence[Story]
) -> Iterator[tuple[list[Tensor], Sequence[Story]]]:
    """Videos of stories, as many at once as the plan is for; the last batch is filled up."""
    from lltk.bench.agreement import videos

    batch = plan.transformer.geometry.batch
    for start in range(0, len(stories), batch):
        some = stories[start : start + batch]
        made = videos(plan, _filled(some, batch), plan.section.steps, _SEED + start)
        yield made[: len(some)], some


def _filled(stories: Sequence[Story], batch: int) -> list[Story]:
    """A batch of stories, repeated where they are too few."""
    return list(islice(cycle(stories), batch))


def _error_row(row: dict[str, Any]) -> dict[str, str]:
    blocks = {k: v for k, v in row["errors"].items() if k != "output"}
    worst = max(blocks, key=blocks.__getitem__)
    first, *_, last = blocks
    return {
        "recipe": row["name"],
        f"{first}": f"{blocks[first]:.4f}",
        f"{last}": f"{blocks[last]:.4f}",
        "worst block": f"{blocks[worst]:.4f} ({worst})",
        "output": f"{row['errors']['output']:.4f}",
    }
