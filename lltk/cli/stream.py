"""``lltk stream``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from lltk.cli.logs import hide_loading
from lltk.cli.plans import show_description, show_dry_run
from lltk.cli.tables import row_table
from lltk.graph.recipe_files import find_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lltk.stream.script import Shot

_File = click.Path(path_type=Path)


@click.command("stream")
@click.argument("recipe")
@click.option("--script", type=_File, help="Shot script: YAML, a caption and seconds a shot.")
@click.option("--prompt", help="One shot's caption, instead of a script.")
@click.option("--seconds", type=float, help="The prompt's length (default: 5).")
@click.option("-o", "--output", type=_File, help="The video: MP4, written as frames arrive.")
@click.option("--contact-sheet", type=_File, help="PNG with a row of frames a shot.")
@click.option(
    "--image",
    type=_File,
    help="The video's first frame; cropped to its aspect, and on white where it is transparent.",
)
@click.option("--seed", type=click.IntRange(0), help="Of the noise (default: the recipe's).")
@click.option("--steps", type=click.IntRange(1), help="Denoising passes (default: the recipe's).")
@click.option("--guidance", type=float, help="1 for none (default: the recipe's).")
@click.option("--save", type=_File, help="File to keep the stream's state in, to go on later.")
@click.option("--resume", type=_File, help="State to go on from; it knows script and seed.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--device", help="Where it runs (default: a GPU if there is one).")
@click.option("--overwrite", is_flag=True, help="Replace outputs that lltk did not write, too.")
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory; make nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: str,
    script: Path | None,
    prompt: str | None,
    seconds: float | None,
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
    overwrite: bool,
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
    from lltk.cli.inputs import inputs_of
    from lltk.cli.outputs import share_cores, summary
    from lltk.cli.stream_to_files import Files, stream_to_files
    from lltk.files.outputs import check_outputs
    from lltk.graph.recipe import load_recipe
    from lltk.parallel.ranks import joined
    from lltk.stream.state import read_state
    from lltk.streaming import plan_stream

    with joined(device) as ranks:
        speaks = ranks.rank == 0
        console = Console(quiet=as_json or not speaks)
        path = find_recipe(recipe)
        given = {"seed": seed, "steps": steps, "guidance": guidance}
        changes = [f"stream.{key}={value}" for key, value in given.items() if value is not None]
        if resume is not None and seed is not None:
            raise ValueError("--seed: a resumed stream has its own; drop the option")
        shots = _shots(script, prompt, seconds, resume, image)
        resolved = load_recipe(path, (*overrides, *changes))
        if output is None and not dry_run:
            raise ValueError("-o: name a file for the video")
        if resume is not None and output is not None and output.exists() and not overwrite:
            raise ValueError(
                f"-o: {output} exists, and a resumed stream's file holds the continuation "
                "alone; name a new file, or replace it with --overwrite"
            )
        files = Files(script, output, contact_sheet, image, save, resume)
        read = [*inputs_of(path, resolved.resolved()), *files.inputs(ranks.size)]
        check_outputs(files.outputs(ranks.size), read, overwrite)
        if not dry_run:
            share_cores(ranks.device)
        hide_loading(speaks)
        with console.status("compiling"):
            plan = plan_stream(resolved, ranks.device, weights=not dry_run)
        if shots:
            console.print(plan.chunking.statement(shots), highlight=False)
        show_description(console, plan)
        if dry_run:
            kept = None if resume is None else read_state(resume).timeline
            if kept is not None:
                console.print(f"It would go on at chunk {kept.index}; {len(kept.chunks)} are left")
            written = [str(each.path) for each in files.outputs(ranks.size)]
            for number, shot in enumerate(shots, 1):
                console.print(f"shot {number} shows: {shot.caption}", markup=False)
            if written:
                console.print(f"It would write {', '.join(written)}", highlight=False)
            facts = {
                "script": [shot.model_dump() for shot in shots],
                "resume": None if kept is None else kept.index,
                "seed": plan.section.seed,
                "outputs": written,
            }
            console.print(f"seed: {plan.section.seed}", highlight=False)
            show_dry_run(console, plan, image is not None, facts, as_json and speaks)
            return
        again = ["lltk", "stream", recipe]
        if ranks.size > 1:
            again[:1] = ["torchrun", "--nproc-per-node", str(ranks.size), "-m", "lltk"]
        for change in (*overrides, *changes):
            if not change.startswith("stream.seed="):  # the state knows it
                again += ["--set", change]
        result = stream_to_files(console, ranks, plan, shots, files, again)
        if not speaks:
            return
        if as_json:
            click.echo(json.dumps(result, indent=2))
        rows = [{"what": what, "": value} for what, value in summary(result).items()]
        console.print(row_table(str(output), rows))


def _shots(
    script: Path | None,
    prompt: str | None,
    seconds: float | None,
    resume: Path | None,
    image: Path | None,
) -> Sequence[Shot]:
    """The shots to show, from the script or the prompt; none where a stream is resumed.

    Raises:
        ValueError: not exactly one of script, prompt and resume is given.
    """
    from lltk.files.reading import check_regular
    from lltk.stream.script import load_script, single_shot

    if sum(source is not None for source in (script, prompt, resume)) != 1:
        raise ValueError("name what to stream: one of --script, --prompt and --resume")
    if resume is not None and image is not None:
        raise ValueError("--image: a resumed stream has its first frame; drop the option")
    if seconds is not None and prompt is None:
        raise ValueError("--seconds: is the length of a --prompt; drop the option")
    for file in (image, resume):
        if file is not None:
            check_regular(file)
    if script is not None:
        return load_script(script)
    return () if prompt is None else single_shot(prompt, 5.0 if seconds is None else seconds)
