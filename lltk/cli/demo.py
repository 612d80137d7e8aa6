"""``lltk demo``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from lltk.cli import stream
from lltk.cli.options import NamedPath, overwrite_option


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=NamedPath(),
    default=Path("demo.mp4"),
    show_default=True,
    help="The video; its contact sheet is written beside it.",
)
@click.option("--seed", type=click.IntRange(0), help="Seed of the noise (default: the recipe's).")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory; make nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    output: Path,
    seed: int | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Stream four shots with the tiny model that comes with lltk.

    Writes an MP4 video and a contact sheet, a PNG with some frames of each shot. The command is
    `lltk stream tiny_stream` with a script that comes with lltk; it runs on the CPU.

    \b
    Example:
      lltk demo
    """
    script = Path(str(files("lltk.models.tiny"))) / "demo.yaml"
    sheet = output.with_suffix(".png")
    ctx.invoke(
        stream.command,
        recipe="tiny_stream",
        script=script,
        output=output,
        contact_sheet=sheet,
        seed=seed,
        device="cpu",
        overwrite=overwrite,
        dry_run=dry_run,
        as_json=as_json,
    )
    if not (dry_run or as_json):
        click.echo(f"The video is {output}, its shots are in {sheet}; the script is {script}.")
