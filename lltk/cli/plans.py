"""What ``lltk stream`` shows of a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from lltk.cli.tables import log_tables, memory_table, row_table

if TYPE_CHECKING:
    from rich.table import Table

    from lltk.streaming import Plan
    from lltk.streaming.placement import Placement


def show_description(console: Console, plan: Plan) -> None:
    """Print what runs where."""
    from lltk.streaming import describe

    for part, what in describe(plan).items():
        console.print(f"{part}: {what}", highlight=False)


def show_dry_run(
    console: Console, plan: Plan, image: bool, facts: Mapping[str, Any], as_json: bool
) -> str:
    """Print passes and memory; gives why the plan cannot run here, or nothing.

    Args:
        console: for people; quiet where it should not print.
        plan: of the stream.
        image: whether the video begins with one.
        facts: what else the command would do, which people are shown elsewhere.
        as_json: whether to print the same as JSON.
    """
    from lltk.streaming import describe, loading_memory, refusal, stream_memory
    from lltk.streaming.placement import proposals

    ways = proposals(plan)
    log, reason = plan.log, refusal(plan, image)
    loading, running = loading_memory(plan, image), stream_memory(plan)
    if as_json:
        found = {
            **facts,
            "plan": describe(plan),
            "log": [entry.plain() for entry in log],
            "memory": running,
            "loading": loading,
            "placements": [asdict(way) for each in ways for way in each],
            "refusal": reason,
        }
        click.echo(json.dumps(found, indent=2))
    console.print(log_tables(log))
    for when, devices in (("before it runs", loading), ("while it runs", running)):
        for where, owners in devices.items():
            console.print(f"On {where}, {when}:", memory_table(owners), sep="\n")
    if ways:
        console.print(_placement_table(ways))
    if reason:
        console.print(f"It cannot run here: {reason}", markup=False, highlight=False)
    return reason


def _placement_table(ways: Sequence[Sequence[Placement]]) -> Table:
    """Ways to use some numbers of GPUs; the fastest of each is proposed."""
    rows = [
        {
            "GPUs": str(way.gpus),
            "ranks": str(way.ranks),
            "stream.decoder.device": way.device,
            "ms a chunk": f"{way.chunk_ms:.0f}",
            "proposed": "yes" if way is each[0] else "",
        }
        for each in ways
        for way in each
    ]
    return row_table("Where to decode, by a model of H200s", rows)
