"""``lltk prepare``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import click
from rich.console import Console

from lltk.cli.bars import Bars, shown_progress
from lltk.cli.logs import logged
from lltk.cli.options import download_option
from lltk.graph.recipe_files import find_recipe

_MIB = 1 << 20
_WAIT = timedelta(hours=6)
"""How long a rank waits for the others, which may have a shard to encode."""
_LEFT = "shards that are whole stay; go on with --resume"


@click.command("prepare")
@click.argument("recipe")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The set's folder."
)
@click.option(
    "--resume", is_flag=True,
    help="Go on with the set in the folder, if there is one; check what is there.",
)  # fmt: skip
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a key of the recipe; may be repeated.",
)  # fmt: skip
@download_option
@click.option("--device", help="Where clips are encoded (default: a GPU if there is one).")
@click.option("--dry-run", is_flag=True, help="Show what would be written; encode nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: str,
    output: Path,
    resume: bool,
    overrides: tuple[str, ...],
    download: bool,
    device: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Encode the clips that a RECIPE trains on, once for all runs.

    RECIPE is that of `lltk train`, with train.data.clips for the number of clips. The folder gets
    latents and embeddings in shards: tar files that WebDataset reads too. A run trains on it with
    --set train.data.prepared=FOLDER, without the videos.

    The exit code is 1 if the disk is full, or the command is interrupted. --resume then goes on,
    and writes the same bytes.

    \b
    Example:
      lltk prepare tiny_train --set train.data.clips=512 -o clips
      lltk train tiny_train --set train.data.clips=512 --set train.data.prepared=clips -o runs/tiny
      torchrun --nproc-per-node 4 -m lltk prepare my.yaml -o clips --resume
    """
    from lltk.cli.inputs import inputs_of
    from lltk.files.outputs import Output, check_outputs
    from lltk.graph.recipe import read_recipe
    from lltk.models.hub import on_disk
    from lltk.parallel.ranks import joined
    from lltk.tasks.preparing import begun, plan_preparing, prepare, stored_facts
    from lltk.train.prepared import SET

    with joined(device, _WAIT) as ranks:
        console = Console(quiet=as_json or ranks.rank > 0)
        path = find_recipe(recipe)
        data = on_disk(read_recipe(path, overrides), download)
        plan = plan_preparing(data, ranks.device, str(path))
        named = plan.section.data.prepared
        if named is not None and Path(named).absolute() != output.absolute():
            raise ValueError(
                f"-o: {output} is not {named}, which train.data.prepared names; make them one"
            )
        if ranks.rank == 0:
            inputs = [each for each in inputs_of(path, data) if str(each) != named]
            check_outputs([Output(output, SET)], inputs, overwrite=True)
        if dry_run:
            facts, found = begun(plan, output, resume), stored_facts(output, resume) is not None
            shards = [part.name for part in facts.parts]
            size = (facts.clips + facts.held_out) * plan.latent_bytes
            if as_json and ranks.rank == 0:
                said = {
                    "device": str(ranks.device),
                    "clips": facts.clips,
                    "held_out": facts.held_out,
                    "shards": shards,
                    "latent_bytes": size,
                    "resume": {"asked": resume, "found": found},
                }
                click.echo(json.dumps(said, indent=2))
            console.print(
                f"Plan: {facts.clips} clips and {facts.held_out} held out, in {len(shards)} "
                f"shards, encoded on {ranks.device}; latents take {size / _MIB:,.1f} MiB"
            )
            begins = "begin, as there is no set" if resume else "begin"
            console.print(f"It would {f'go on with {output}' if found else begins}")
            return
        with ExitStack() as opened:
            opened.enter_context(logged(Console(stderr=True)))
            note = Bars(opened.enter_context(shown_progress(console)))
            try:
                facts = prepare(plan, output, resume=resume, note=note, ranks=ranks)
            except OSError as error:
                raise click.ClickException(f"{error}; {_LEFT}") from error
            except KeyboardInterrupt as error:
                raise click.ClickException(f"stopped; {_LEFT}") from error
        if as_json and ranks.rank == 0:
            said = {"output": str(output), "clips": facts.clips, "held_out": facts.held_out}
            click.echo(json.dumps(said | {"files": facts.files}, indent=2))
        console.print(
            f"{facts.clips} clips and {facts.held_out} held out, in {len(facts.files)} shards; "
            f"train on them with --set train.data.prepared={output}"
        )
