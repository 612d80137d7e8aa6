"""``lltk stream``."""

from __future__ import annotations

import json
import logging
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
from lltk.cli.plans import show_description, show_dry_run
from lltk.cli.tables import row_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lltk.stream.script import Shot

_File = click.Path(path_type=Path)


@click.command("stream")
@click.argument("recipe")
@click.option(
    "--script", type=_File, help="Shot script: YAML or JSON, a caption and seconds a shot."
)
@click.option("--prompt", multiple=True, help="A shot's caption, instead of a script; repeatable.")
@click.option("--prompts", type=_File, help="Text file of prompts, one a line: a video each.")
@click.option(
    "--seeds", type=click.IntRange(1), help="With --prompts: videos of each (default: 1)."
)
@click.option("--seconds", type=float, help="Length of each prompt's shot (default: 5).")
@click.option(
    "-o", "--output", type=NamedPath(),
    help="The video. Its suffix decides: .mp4, .mkv, .webm, .gif, .webp; none for a folder of PNG "
    "frames (default: the recipe's name, MP4). With --prompts, the folder of the videos.",
)  # fmt: skip
@click.option("--contact-sheet", type=_File, help="PNG with a row of frames a shot.")
@click.option(
    "--image",
    type=_File,
    help="The video's first frame; cropped to its aspect, and on white where it is transparent.",
)
@click.option("--seed", type=click.IntRange(0), help="Of the noise (default: the recipe's).")
@click.option("--steps", type=click.IntRange(1), help="Denoising passes (default: the recipe's).")
@click.option("--guidance", type=float, help="1 for none (default: the recipe's).")
@click.option(
    "--lora",
    "adapters",
    multiple=True,
    metavar="FILE[:STRENGTH]",
    help="Adapter (LoRA) to merge, and how strongly (default: 1); may be repeated. Replaces the "
    "recipe's.",
)
@click.option("--save", type=_File, help="File to keep the stream's state in, to go on later.")
@click.option("--resume", type=_File, help="State to go on from; it knows script and seed.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@download_option
@device_option
@provider_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory; make nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: str,
    script: Path | None,
    prompt: tuple[str, ...],
    prompts: Path | None,
    seeds: int | None,
    seconds: float | None,
    output: Path | None,
    contact_sheet: Path | None,
    image: Path | None,
    seed: int | None,
    steps: int | None,
    guidance: float | None,
    adapters: tuple[str, ...],
    save: Path | None,
    resume: Path | None,
    overrides: tuple[str, ...],
    download: bool,
    device: str | None,
    provider: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Stream a video from captions by a RECIPE with a stream section (a file, or a shipped name).

    Frames are written as they are made. Ctrl-C, or a kill, stops after the chunk in flight: what
    was written plays, and the state is kept, in --save or beside the video. --resume goes on from
    there; the new file holds the continuation.

    With --prompts each prompt becomes a video, as often as --seeds says, in the folder -o; the same
    command makes those that are missing. They are named as VBench and VBench-Long look for them.

    \b
    Example:
      lltk stream tiny_stream --script shots.yaml -o video.mp4 --contact-sheet shots.png
      lltk stream tiny_stream --prompt "a red circle moving left" --seconds 10 -o red.mp4
      lltk stream tiny_stream --prompts prompts.txt --seeds 5 -o videos
      lltk stream tiny_stream --prompt "a red circle" --lora style.safetensors:0.8 -o red.mp4
      lltk stream tiny_stream --resume video.state.safetensors -o rest.mp4
      torchrun --nproc-per-node 2 -m lltk stream wan22_5b_stream_sp2 --script s.yaml -o video.mp4
    """
    from lltk.cli.inputs import adapter_keys, find_source
    from lltk.cli.outputs import share_cores, summary
    from lltk.cli.stream_prompts import check_videos, jobs, read_prompts, stream_prompts
    from lltk.cli.stream_to_files import Files, stream_to_files, unused
    from lltk.files.outputs import check_outputs
    from lltk.parallel.ranks import joined
    from lltk.stream.frame_folder import check_form
    from lltk.stream.state import read_state

    with joined(device) as ranks:
        speaks = ranks.rank == 0
        console = Console(quiet=as_json or not speaks)
        given = {"seed": seed, "steps": steps, "guidance": guidance}
        changes = [f"stream.{key}={value}" for key, value in given.items() if value is not None]
        changes += adapter_keys(adapters)
        if resume is not None and seed is not None:
            raise ValueError("--seed: a resumed stream has its own; drop the option")
        alone = {"--contact-sheet": contact_sheet, "--image": image, "--save": save}
        if prompts and (idle := [name for name, value in alone.items() if value is not None]):
            raise ValueError(f"{idle[0]}: is for a single video; drop it, or use --prompt")
        shots = _shots(script, prompt, prompts, seconds, resume, image)
        wanted = []
        if prompts is not None:
            output = output or Path(prompts.stem)
            wanted = jobs(read_prompts(prompts), seeds or 1, output)
        elif seeds is not None:
            raise ValueError("--seeds: is for --prompts; drop it, or use --seed for one video")
        changed = (*overrides, *changes)
        source = find_source(recipe, changed, download, not dry_run, provider, device)
        output = unused(Path(f"{source.path.stem}.mp4")) if output is None else output
        if resume is not None and output.exists() and not overwrite:
            raise ValueError(
                f"-o: {output} exists, and a resumed stream's file holds the continuation "
                "alone; name a new file, or replace it with --overwrite"
            )
        files = Files(script, output, contact_sheet, image, save, resume)
        written = check_videos(output) if wanted else files.outputs(ranks.size)
        read = [*source.inputs, *files.inputs(ranks.size)]
        check_outputs(written, read if prompts is None else [*read, prompts], overwrite)
        check_form(output, folder=bool(wanted))
        if not speaks:
            logging.disable(logging.WARNING)  # rank 0 shows them
        with console.status("compiling"):
            plan = source.plan(ranks.device, weights=not dry_run)
        if not dry_run:
            share_cores(plan.device)
        if shots:
            console.print(plan.chunking.statement(shots), highlight=False)
        show_description(console, plan)
        if wanted:
            console.print(f"{len(wanted)} videos in {output}", highlight=False)
        if dry_run:
            kept = None if resume is None else read_state(resume).timeline
            if kept is not None:
                console.print(f"It would go on at chunk {kept.index}; {len(kept.chunks)} are left")
            paths = [str(each.path) for each in wanted or written]
            for number, shot in enumerate(shots, 1):
                console.print(f"shot {number} shows: {shot.caption}", markup=False)
            console.print(f"It would write {', '.join(paths)}", highlight=False)
            facts = {
                "script": [shot.model_dump() for shot in shots],
                "resume": None if kept is None else kept.index,
                "seed": plan.section.seed,
                "outputs": paths,
            }
            console.print(f"seed: {plan.section.seed}", highlight=False)
            if show_dry_run(console, plan, image is not None, facts, as_json and speaks):
                raise SystemExit(1)
            return
        if wanted:
            length = 5.0 if seconds is None else seconds
            done = stream_prompts(console, ranks, plan, wanted, length, output)
            if as_json and speaks:
                click.echo(json.dumps(done, indent=2))
            console.print(f"{done['made']} of {done['videos']} videos made; all are in {output}")
            return
        again = ["lltk", "stream", recipe]
        if ranks.size > 1:
            again[:1] = ["torchrun", "--nproc-per-node", str(ranks.size), "-m", "lltk"]
        again += [] if provider is None else ["--provider", provider]
        for change in changed:
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
    prompt: Sequence[str],
    prompts: Path | None,
    seconds: float | None,
    resume: Path | None,
    image: Path | None,
) -> Sequence[Shot]:
    """The shots of a single video, from the script or the prompts; none where it is resumed.

    Raises:
        ValueError: not exactly one of script, prompt, prompts and resume is given.
    """
    from lltk.files.reading import check_regular
    from lltk.stream.script import load_script, prompted

    if sum(bool(source) for source in (script, prompt, prompts, resume)) != 1:
        raise ValueError("name what to stream: one of --script, --prompt, --prompts and --resume")
    if resume is not None and image is not None:
        raise ValueError("--image: a resumed stream has its first frame; drop the option")
    if seconds is not None and not (prompt or prompts):
        raise ValueError("--seconds: is the length of a --prompt; drop the option")
    for file in (image, resume):
        if file is not None:
            check_regular(file)
    if script is not None:
        return load_script(script)
    return prompted(prompt, 5.0 if seconds is None else seconds)
