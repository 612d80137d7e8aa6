"""``lltk export``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from lltk.cli.options import download_option, overwrite_option
from lltk.cli.tables import memory_table, row_table
from lltk.graph.recipe_files import find_recipe

if TYPE_CHECKING:
    from lltk.exporting import Text


@click.command("export")
@click.argument("recipe")
@click.option(
    "--target", required=True, type=click.Choice(["ort"]),
    help="What is to run the graphs: ort is ONNX Runtime.",
)  # fmt: skip
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the bundle."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a key of the recipe; may be repeated.",
)  # fmt: skip
@click.option(
    "--text", type=click.Choice(["bundle", "reference"]), default="bundle", show_default=True,
    help="Where the text encoder is: in the bundle, or outside, known by its digest.",
)  # fmt: skip
@download_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Emit the graphs without weights; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: str,
    target: str,
    output: Path,
    overrides: tuple[str, ...],
    text: Text,
    download: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the graphs of a RECIPE's stream in ONNX, as a bundle.

    A bundle holds the transformer's and the decoder's graphs, their weights, and golden values:
    inputs of each graph, and what torch makes of them. It is written once ONNX Runtime gives the
    same; `lltk stream` then plays it. This version exports float32.

    \b
    Example:
      lltk export tiny_stream --target ort -o bundle
      lltk bundle verify bundle
      lltk stream bundle --prompt "a red circle moving right" -o red.mp4
    """
    console = Console(quiet=as_json)
    path = find_recipe(recipe)
    from lltk.cli.inputs import inputs_of, located
    from lltk.export.facts import BUNDLE
    from lltk.exporting import emitted, export, plan_export
    from lltk.files.outputs import Output, check_outputs
    from lltk.graph.memory import estimate
    from lltk.stream.runtimes.onnx_graph import check_installed

    resolved = located(path, overrides, download, not dry_run)
    check_installed()
    check_outputs([Output(output, BUNDLE)], inputs_of(path, resolved.resolved()), overwrite)
    start = time.perf_counter()
    with console.status("making the Programs") as status:
        plan = plan_export(resolved, weights=not dry_run, text=text)
        if dry_run:
            graphs = emitted(plan)
        else:
            found = export(plan, output, overwrite, status.update)
    if dry_run:
        memory = {name: estimate(program) for name, program in plan.stages.items()}
        if as_json:
            facts = {"target": target, "nodes": graphs, "memory": memory, "outputs": [str(output)]}
            click.echo(json.dumps(facts, indent=2))
        rows = [{"graph": name, "nodes": str(count)} for name, count in graphs.items()]
        console.print(row_table(f"It would write {output}", rows))
        for name, owners in memory.items():
            console.print(f"{name}:", memory_table(owners), sep="\n")
        return
    seconds = time.perf_counter() - start
    if as_json:
        cases = [each.plain() for each in found]
        click.echo(json.dumps({"output": str(output), "seconds": seconds, "golden": cases}))
    console.print(row_table("Golden values", [each.row() for each in found], 2))
    console.print(f"A bundle for {target} in {seconds:.1f} s, written to {output}")
