"""``lltk stream``."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lltk.cli.recipes import find_recipe
from lltk.cli.tables import memory_table, row_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lltk.stream.script import Shot
    from lltk.streaming import StreamPlan

_File = click.Path(path_type=Path)


@click.command("stream")
@click.argument("recipe")
@click.option("--script", type=_File, help="Shot script: YAML, a caption and seconds a shot.")
@click.option("--prompt", help="One shot's caption, instead of a script.")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="Its length.")
@click.option("-o", "--output", type=_File, help="The video: MP4, written as frames arrive.")
@click.option("--contact-sheet", type=_File, help="PNG with a row of frames a shot.")
@click.option("--image", type=_File, help="The video's first frame; cropped to its aspect.")
@click.option("--seed", type=click.IntRange(0), help="Of the noise (default: the recipe's).")
@click.option("--steps", type=click.IntRange(1), help="Denoising passes (default: the recipe's).")
@click.option("--guidance", type=float, help="1 for none (default: the recipe's).")
@click.option("--save", type=_File, help="File to keep the stream's state in, to go on later.")
@click.option("--resume", type=_File, help="State to go on from; it knows script and seed.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--device", help="Where it runs (default: a GPU if there is one).")
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory; make nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: str,
    script: Path | None,
    prompt: str | None,
    seconds: float,
    output: Path | None,
    contact_sheet: Path | None,
    image: Path | None,
    seed: int | None,
    steps: int | None,
    guidance: float | None,
    save: Path | None,
    resume: Path | None,
    overrides: tuple[str, ...],
    device: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Stream a video from captions by a RECIPE with a stream section (a file, or a shipped name).

    Frames are written as they are made. Ctrl-C, or a kill, stops after the chunk in flight: what
    was written plays, and the state is kept, in --save or beside the video. --resume goes on from
    there; the new file holds the continuation.

    \b
    Example:
      lltk stream tiny_stream --script shots.yaml -o video.mp4 --contact-sheet shots.png
      lltk stream tiny_stream --prompt "a red circle moving left" --seconds 10 -o red.mp4
      lltk stream tiny_stream --resume video.state.safetensors -o rest.mp4
    """
    console = Console(quiet=as_json)
    path = find_recipe(recipe)
    given = {"seed": seed, "steps": steps, "guidance": guidance}
    changes = [f"stream.{key}={value}" for key, value in given.items() if value is not None]
    shots = _shots(script, prompt, seconds, resume, image)
    import torch

    from lltk.cli.outputs import check_writable
    from lltk.graph.recipe import load_recipe
    from lltk.streaming import plan_stream

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    resolved = load_recipe(path, (*overrides, *changes))
    if not dry_run:
        if output is None:
            raise ValueError("-o: name a file for the video")
        if resume is not None and output.exists():
            raise ValueError(
                f"-o: {output} exists, and a resumed stream's file holds the continuation alone; "
                "name a new file"
            )
        check_writable(file for file in (output, contact_sheet, save) if file is not None)
    with console.status("compiling"):
        plan = plan_stream(resolved, chosen, weights=not dry_run)
    if shots:
        console.print(plan.statement(shots), highlight=False)
    for part, what in plan.describe().items():
        console.print(f"{part}: {what}", highlight=False)
    if dry_run:
        if as_json:
            facts = {"plan": plan.describe(), "memory": plan.memory}
            click.echo(json.dumps(facts, indent=2))
        for where, owners in plan.memory.items():
            console.print(memory_table(owners), f"on {where}")
        return
    assert output is not None
    again = shlex.join(
        ["lltk", "stream", recipe, *(p for change in (*overrides, *changes) for p in ("--set", change))]
    )
    result = _run(console, plan, shots, output, contact_sheet, image, save, resume, again)
    if as_json:
        click.echo(json.dumps(result, indent=2))


def _shots(
    script: Path | None,
    prompt: str | None,
    seconds: float,
    resume: Path | None,
    image: Path | None,
) -> Sequence[Shot]:
    """What is asked for; exactly one of script, prompt and resume says it."""
    from lltk.stream.script import load_script, single_shot

    if sum(source is not None for source in (script, prompt, resume)) != 1:
        raise ValueError("name what to stream: one of --script, --prompt and --resume")
    if resume is not None and image is not None:
        raise ValueError("--image: a resumed stream has its first frame; drop the option")
    if script is not None:
        return load_script(script)
    return () if prompt is None else single_shot(prompt, seconds)


def _run(
    console: Console,
    plan: StreamPlan,
    shots: Sequence[Shot],
    output: Path,
    sheet: Path | None,
    image: Path | None,
    save: Path | None,
    resume: Path | None,
    again: str,
) -> dict[str, Any]:
    """Stream to the files; what it did, as plain data."""
    from lltk.cli.outputs import Frames, asked_to_stop, captions_of, memory_used
    from lltk.graph.memory import readable
    from lltk.stream.image import read_image
    from lltk.stream.video import VideoWriter
    from lltk.streaming import open_stream

    first = None
    if image is not None:
        first, note = read_image(image, *plan.size)
        if note is not None:
            console.print(note)
    begun = time.perf_counter()
    state = save or output.with_suffix(".state.safetensors")
    ...
    return {}
