"""``lltk compare``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from lltk.cli.options import (
    NamedPath,
    device_option,
    download_option,
    overwrite_option,
    provider_option,
)
from lltk.cli.tables import row_table
from lltk.parallel.devices import find_device

if TYPE_CHECKING:
    from lltk.streaming import Plan


@click.command("compare")
@click.argument("recipes", nargs=-1, required=True)
@click.option("-o", "--output", type=NamedPath(), help="The record's path, without a suffix.")
@click.option(
    "--shots", type=click.IntRange(0, 1_000_000), default=30, show_default=True,
    help="Shots of the tiny world to score for each recipe; rounded up to videos of 3.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.IntRange(0, 10_000), default=0, show_default=True,
    help="Single shots of 60 s for each recipe, to see how long they keep their identity.",
)  # fmt: skip
@click.option(
    "--at-once", type=click.IntRange(1, 65_536),
    help="Videos to stream at once (default: 128).",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 1024),
              help="Number of processes that score videos (default: 2).")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Change a key of every recipe; may be repeated.")  # fmt: skip
@device_option
@provider_option
@download_option
@overwrite_option
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("--dry-run", is_flag=True, help="Show the plan; compare nothing.")
def command(
    recipes: tuple[str, ...],
    output: Path | None,
    shots: int,
    minutes: int,
    at_once: int | None,
    workers: int | None,
    overrides: tuple[str, ...],
    device: str | None,
    provider: str | None,
    download: bool,
    overwrite: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Compare stream RECIPES, or bundles, with the first of them.

    They have one model and geometry, and differ in their precision for example. For each the
    command shows the relative error of every block and of the output; of a bundle, whose blocks are
    not seen, the output's. A bundle makes one video at a time, and so do recipes beside it.

    It also makes videos of the tiny world and scores them: how many shots show their caption, and
    how much of its identity a shot keeps, with 95 % confidence intervals. With --shots 0 it shows
    errors alone, for any model, and decodes nothing.

    \b
    Example:
      lltk compare tiny_stream tiny_stream_nvfp4 --shots 60
      lltk compare tiny_stream tiny_stream_nvfp4 --shots 1008 --device cuda -o nvfp4_record
      lltk compare tiny_stream bundle --shots 0
      lltk compare wan22_5b_stream wan22_5b_stream_nvfp4_cache --shots 0 --device cuda
    """
    if len(recipes) < 2:
        raise ValueError("RECIPES: name at least two; the first is what others are compared with")
    if not (shots or minutes):
        for option, value in (("--at-once", at_once), ("--workers", workers)):
            if value is not None:
                raise ValueError(f"{option}: no videos are made; drop it, or name --shots")
    at_once, workers = at_once or 128, workers or 2
    console = Console(quiet=as_json)
    from lltk.bench.comparison import (
        CHUNKS,
        SHOTS,
        Comparison,
        check_same,
        check_size,
        error_rows,
        minute_row,
        quality_row,
        text,
    )
    from lltk.bench.record import make_record, record_files, record_outputs, write_record
    from lltk.cli.inputs import find_source
    from lltk.cli.outputs import share_cores
    from lltk.files.outputs import check_outputs
    from lltk.graph.recipe import load_recipe
    from lltk.graph.recipe_files import find_recipe
    from lltk.ops.implementations import check_device
    from lltk.streaming import describe, is_bundle

    chosen = find_device(device)
    films = -(-shots // SHOTS)
    bundles = {
        name: find_source(name, overrides, download, not dry_run, provider)
        for name in recipes
        if is_bundle(name)
    }
    if provider is not None and not bundles:
        raise ValueError("--provider: is for bundles, and none is named; drop it")
    batch = 1 if bundles else min(max(films, minutes, 1), at_once)
    sizes = (*overrides, f"geometry.batch={batch}")
    geometries = []
    for name in recipes:
        recipe = bundles[name].recipe if name in bundles else load_recipe(find_recipe(name), sizes)
        geometries.append((Path(name).stem, recipe.geometry))
    check_same("geometry", [(name, geometry.model_dump()) for name, geometry in geometries])
    if films or minutes:
        check_size(geometries[0][1])
    sources = [
        bundles.get(name) or find_source(name, sizes, download, not dry_run) for name in recipes
    ]
    if output is not None:
        read = [file for source in sources for file in source.inputs]
        check_outputs(record_outputs(output), read, overwrite)
    plans: list[tuple[str, Plan]] = []
    for source in sources:
        with console.status(f"compiling {source.path.stem}"):
            plan = source.plan(chosen, weights=not dry_run)
        console.print(f"{source.path.stem}: {describe(plan)['transformer']}", highlight=False)
        plans.append((source.path.stem, plan))
        check_same("model.config", [(name, plan.config) for name, plan in plans])
    if dry_run:
        told = (
            f"errors over {SHOTS * CHUNKS} chunks, {films * SHOTS} shots and {minutes} "
            f"minutes a recipe, {batch} videos at once, {workers} processes that score"
        )
        files = [] if output is None else [str(path) for path in record_files(output)]
        if as_json:
            described = {name: describe(plan) for name, plan in plans}
            click.echo(json.dumps({"plan": told, "recipes": described, "outputs": files}))
        console.print(f"Plan: {told}")
        if files:
            console.print(f"It would write {', '.join(files)}", highlight=False)
        return
    for source, (_, plan) in zip(sources, plans, strict=True):
        if source.bundle is None:
            check_device(plan.implementations, chosen)
    share_cores(chosen)
    comparison = Comparison(plans, films, minutes)
    with console.status("comparing") as status:
        results = list(comparison.results(workers, status.update))
    line = ["lltk", "compare", *recipes, "--shots", str(shots), "--minutes", str(minutes)]
    line += ["--at-once", str(at_once), "--device", str(chosen)]
    line += [] if provider is None else ["--provider", provider]
    line += [part for change in overrides for part in ("--set", change)]
    record = make_record("compare", shlex.join(line), comparison.method, results)
    if output is not None:
        write_record(output, record, text(record))
    if as_json:
        click.echo(record.model_dump_json(indent=2))
    console.print(row_table("Relative error", error_rows(results)))
    if films:
        console.print(row_table("Tiny world", [quality_row(row, results[0]) for row in results]))
    if minutes:
        console.print(row_table("Single shots of 60 s", [minute_row(row) for row in results]))
