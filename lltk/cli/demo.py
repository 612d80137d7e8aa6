"""``lltk demo``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from lltk.cli import stream


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo.mp4"),
    show_default=True,
    help="The video; a contact sheet lies beside it.",
)
@click.option("--seed", type=click.IntRange(0), help="Of the noise (default: the recipe's).")
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory; make nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context, output: Path, seed: int | None, dry_run: bool, as_json: bool
) -> None:
    """Stream four shots from captions to an MP4 and a contact sheet, with the shipped tiny model.

    It is `lltk stream tiny_stream` with a shipped script.

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
        dry_run=dry_run,
        as_json=as_json,
    )
    if not (dry_run or as_json):
        click.echo(f"The video is {output}, its shots are in {sheet}; the script is {script}.")
