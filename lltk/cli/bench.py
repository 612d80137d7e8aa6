"""``lltk bench``."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import click
from rich.console import Console

from lltk.cli.options import (
    FiniteRange,
    NamedPath,
    device_option,
    download_option,
    overwrite_option,
    provider_option,
)
from lltk.cli.tables import memory_table


@click.group("bench")
def command() -> None:
    """Measure speed, and write the results as a record.

    A record is a JSON file, and a Markdown page with a table made from it.

    \b
    Example:
      lltk bench stream tiny_stream -o stream_record
    """


@command.command("stream")
@click.argument("recipe")
@click.option("-o", "--output", type=NamedPath(), help="The record's path, without a suffix.")
@click.option(
    "--seconds", type=FiniteRange(0, 3600, min_open=True), default=10.0, show_default=True,
    help="Seconds of video to measure in each run.",
)  # fmt: skip
@click.option(
    "--warmup",
    type=click.IntRange(0, 10_000),
    help="Chunks to stream first, which are not measured (default: until the cache is full).",
)
@click.option(
    "--runs", type=click.IntRange(1, 1000), default=3, show_default=True, help="Number of runs."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a key of the recipe; may be repeated.",
)  # fmt: skip
@device_option
@provider_option
@click.option(
    "--random-weights", is_flag=True,
    help="Use random weights and prompts of the true shapes; needs no files.",
)  # fmt: skip
@download_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory; measure nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def stream(
    recipe: str,
    output: Path | None,
    seconds: float,
    warmup: int | None,
    runs: int,
    overrides: tuple[str, ...],
    device: str | None,
    provider: str | None,
    random_weights: bool,
    download: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Stream by a RECIPE to a video file, and time it.

    RECIPE is a YAML file, the name of a recipe that comes with lltk, or a bundle. The record holds
    the frames a second of the transformer (DiT), of the decoder and end to end (E2E); the latency
    of the first frame; the median (p50) and the 90th percentile (p90) of a chunk's time; the share
    of time spent outside the models; memory by owner; and which implementations ran on which
    device.

    \b
    Example:
      lltk bench stream tiny_stream -o stream_record
      lltk bench stream tiny_stream --set stream.steps=2 --seconds 30 -o two_steps_record
      lltk bench stream wan22_5b_stream_fp8 --random-weights -o stream_5b_record
      torchrun --nproc-per-node 2 -m lltk bench stream wan22_5b_stream_sp2 --random-weights -o sp2
    """
    from lltk.bench.random_weights import random_prompts, with_random_models
    from lltk.bench.record import make_record, record_files, record_outputs, write_record
    from lltk.bench.stream import METHOD, measure, text
    from lltk.cli.inputs import find_source
    from lltk.cli.outputs import share_cores
    from lltk.files.outputs import check_outputs
    from lltk.parallel.ranks import joined
    from lltk.streaming import StreamPlan, describe, refusal, stream_memory

    with joined(device) as ranks:
        console = Console(quiet=as_json or ranks.rank > 0)
        if output is None and not dry_run:
            raise ValueError("-o: name the record's files, without a suffix")
        wanted = not (dry_run or random_weights)
        source = find_source(recipe, overrides, download, wanted, provider, device)
        if source.bundle is not None and random_weights:
            raise ValueError(f"--random-weights: {recipe} is a bundle, which has its own; drop it")
        if output is not None:
            check_outputs(record_outputs(output), source.inputs, overwrite)
        if ranks.rank > 0:
            logging.disable(logging.WARNING)  # rank 0 shows them
        with console.status("compiling"):
            plan = source.plan(ranks.device, weights=wanted)
            if random_weights and not dry_run:
                assert isinstance(plan, StreamPlan)
                plan = with_random_models(plan)
        for part, what in describe(plan).items():
            console.print(f"{part}: {what}", highlight=False)
        for owners in stream_memory(plan).values():
            console.print(memory_table(owners))
        chunks = plan.geometry.pages if warmup is None else warmup
        if output is None or dry_run:
            why = refusal(plan)
            told = f"{runs} runs of {seconds:g} s after {chunks} chunks"
            files = [] if output is None else [str(path) for path in record_files(output)]
            console.print(f"Plan: {told}{', with random weights' if random_weights else ''}")
            if files:
                console.print(f"It would write {', '.join(files)}", highlight=False)
            if as_json and ranks.rank == 0:
                facts = {
                    "plan": describe(plan),
                    "runs": told,
                    "random_weights": random_weights,
                    "memory": stream_memory(plan),
                    "refusal": why,
                    "outputs": files,
                }
                click.echo(json.dumps(facts, indent=2))
            if why:
                console.print(f"It cannot run here: {why}", markup=False, highlight=False)
                raise SystemExit(1)
            return
        share_cores(plan.device)
        with console.status("streaming"):
            prompts = random_prompts(plan) if random_weights else None
            result = {"name": source.path.stem} | measure(plan, seconds, chunks, runs, prompts)
        if ranks.rank != 0:
            return
        where = ["--device", str(ranks.device)]
        if source.bundle is not None:
            where = [] if provider is None else ["--provider", provider]
        flags = ["--random-weights"] if random_weights else []
        flags += [part for change in overrides for part in ("--set", change)]
        flags += ["--seconds", f"{seconds:g}", "--runs", str(runs), *where]
        flags += [] if warmup is None else ["--warmup", str(warmup)]
        line = shlex.join(["lltk", "bench", "stream", recipe, *flags])
        record = make_record("stream", line, METHOD, [result])
        table = text(record)
        write_record(output, record, table)
        if as_json:
            click.echo(record.model_dump_json(indent=2))
        console.print(table, markup=False, highlight=False, soft_wrap=True)
