"""``lltk stream``."""

from __future__ import annotations

import json
import shlex
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lltk.cli.logs import hide_loading
from lltk.cli.plans import show_description, show_dry_run
from lltk.cli.tables import row_table
from lltk.graph.recipe_files import find_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lltk.parallel.ranks import Ranks
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
      torchrun --nproc-per-node 2 -m lltk stream wan22_5b_stream_sp2 --script s.yaml -o video.mp4
    """
    from lltk.cli.outputs import check_writable, share_cores, summary
    from lltk.graph.recipe import load_recipe
    from lltk.parallel.ranks import joined
    from lltk.streaming import plan_stream

    with joined(device) as ranks:
        speaks = ranks.rank == 0
        console = Console(quiet=as_json or not speaks)
        path = find_recipe(recipe)
        given = {"seed": seed, "steps": steps, "guidance": guidance}
        changes = [f"stream.{key}={value}" for key, value in given.items() if value is not None]
        shots = _shots(script, prompt, seconds, resume, image)
        if resume is not None and seed is not None:
            raise ValueError("--seed: a resumed stream has its own; drop the option")
        resolved = load_recipe(path, (*overrides, *changes))
        if not dry_run:
            if output is None:
                raise ValueError("-o: name a file for the video")
            if resume is not None and output.exists():
                raise ValueError(
                    f"-o: {output} exists, and a resumed stream's file holds the continuation "
                    "alone; name a new file"
                )
            check_writable(file for file in (output, contact_sheet, save) if file is not None)
            share_cores(ranks.device)
        hide_loading(speaks)
        with console.status("compiling"):
            plan = plan_stream(resolved, ranks.device, weights=not dry_run)
        if shots:
            console.print(plan.chunking.statement(shots), highlight=False)
        show_description(console, plan)
        if dry_run:
            show_dry_run(console, plan, image is not None, as_json and speaks)
            return
        assert output is not None
        again = ["lltk", "stream", recipe]
        if ranks.size > 1:
            again[:1] = ["torchrun", "--nproc-per-node", str(ranks.size), "-m", "lltk"]
        for change in (*overrides, *changes):
            if not change.startswith("stream.seed="):  # the state knows it
                again += ["--set", change]
        result = _run(
            console, ranks, plan, shots, output, contact_sheet, image, save, resume, again
        )
        if not speaks:
            return
        if as_json:
            click.echo(json.dumps(result, indent=2))
        rows = [{"what": what, "": value} for what, value in summary(result).items()]
        console.print(row_table(str(output), rows))


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
    if image is not None and not image.is_file():
        raise ValueError(f"--image: {image} is no file; name a PNG or JPEG")
    if script is not None:
        return load_script(script)
    return () if prompt is None else single_shot(prompt, seconds)


def _run(
    console: Console,
    ranks: Ranks,
    plan: StreamPlan,
    shots: Sequence[Shot],
    output: Path,
    sheet: Path | None,
    image: Path | None,
    save: Path | None,
    resume: Path | None,
    again: Sequence[str],
) -> dict[str, Any]:
    """Stream to the files; what it did, as plain data.

    Of several ranks the first writes the files; all stop after the same chunk.
    """
    import torch

    from lltk.cli.outputs import Frames, Tally, asked_to_stop, captions_of, memory_used, unwritten
    from lltk.graph.memory import available, readable, total
    from lltk.stream.image import read_image
    from lltk.streaming import open_stream, stream_memory

    first = None
    if image is not None:
        first, note = read_image(image, *plan.size)
        if note is not None:
            console.print(note)
    frames = Frames(output, plan.size, plan.section.fps, plan.writer_threads)
    for where, owners in stream_memory(plan).items():
        free = readable(available(torch.device(where)))
        console.print(f"memory: {readable(total(owners))} on {where}, of {free} free")
    begun = time.perf_counter()
    with console.status("encoding prompts, loading models"):
        sink = frames if ranks.rank == 0 else None
        stream = open_stream(plan, sink, shots, image=first, resume=resume)
    chunks, delivery = stream.session.timeline.chunks, stream.session.delivery
    start = delivery.frame
    if not chunks and not ranks.any(bool(delivery.undelivered)):
        raise ValueError(f"--resume: {resume}: its script is over; nothing is left to make")
    if resume is not None:
        console.print(f"going on at frame {start}; the new file holds the continuation")
    frames.expect(start, chunks, sheet is not None)
    state = save or output.with_suffix(".state.safetensors")
    captions = captions_of(shots, chunks)
    loaded = time.perf_counter()
    tally = Tally(loaded)
    failure: OSError | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        asked_to_stop() as stops,
        nullcontext() if sink is None else sink,
        stream,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        bar = progress.add_task("", total=len(chunks))
        try:
            for report in stream:
                tally.add(report)
                used = readable(memory_used(plan.device))
                held = f"{report.pages + 1} of {plan.transformer.geometry.pages} pages"
                text = f"{tally.rate(frames.count):.1f} fps, {held}, {used}"
                progress.update(bar, advance=1, description=text)
                if ranks.any(bool(stops)):
                    break
            stream.close()
        except OSError as error:
            if ranks.size > 1:
                raise  # the other ranks wait within a chunk
            failure = error
        done = time.perf_counter()
        left = len(stream.session.timeline.chunks)
        stopped = failure is not None or left > 0
        if stopped or save is not None:
            try:
                stream.save(state)
            except OSError as error:
                what = str(failure or f"{output} plays, {frames.count} frames")
                raise click.ClickException(
                    f"{what}; the state is not kept: {error}; stream again, with --save to "
                    "another disk"
                ) from error
        ranks.any(False)  # all have saved
        if stopped and ranks.rank == 0:
            following = output.with_name(f"{output.stem}_rest{output.suffix}")
            resumed = shlex.join([*again, "--resume", str(state), "-o", str(following)])
            what = str(failure) if failure else f"stopped: {output} plays, {frames.count} frames"
            unshown = unwritten(frames, sheet, captions)
            raise click.ClickException(
                f"{what}{unshown}; {left} chunks are left, go on with: {resumed}"
            )
    if unshown := unwritten(frames, sheet, captions):
        raise click.ClickException(f"{output} plays, {frames.count} frames{unshown}")
    return tally.result(frames, done, plan.section.fps) | {
        "output": str(output),
        "state": None if save is None else str(save),
        "load_seconds": loaded - begun,
        "memory_bytes": memory_used(plan.device),
    }
