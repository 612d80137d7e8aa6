"""``lltk bundle``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from lltk.cli.engines import NOT_RUN, print_engines
from lltk.cli.tables import contract_table, row_table

_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group("bundle")
def command() -> None:
    """Look at a bundle, which `lltk export` writes."""


@command.command("show")
@click.argument("bundle", type=click.Path(path_type=Path))
@_json_option
def show(bundle: Path, as_json: bool) -> None:
    """Show what a BUNDLE holds, once every file has been checked.

    \b
    Example:
      lltk bundle show bundle
    """
    from lltk.export.bundle import read_bundle

    facts = read_bundle(bundle)
    if as_json:
        click.echo(json.dumps(facts.model_dump(mode="json"), indent=2))
        return
    console = Console()
    made = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    console.print(
        f"For {facts.target}, opset {facts.opset}; made with {made}", highlight=False, markup=False
    )
    if facts.text is not None:
        outside = f"{facts.text.folder}, digest {facts.text.digest[:16]}"
        console.print(
            f"The text encoder is outside: that of {outside}", highlight=False, markup=False
        )
    for name, stage in facts.stages.items():
        passes = ", ".join(entry.name for entry in stage.log)
        console.print(f"{name}: passes {passes}", highlight=False, markup=False)
        for graph, each in stage.graphs.items():
            console.print(contract_table(f"{name}/{graph}", each.contract))
    if facts.engines:
        print_engines(console, facts.engines)
    files = [{"file": name, "SHA-256": digest[:16]} for name, digest in facts.files.items()]
    console.print(row_table("Files", files))


@command.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--run", is_flag=True, help="Run engines too, on the GPU that they are for.")
@_json_option
def verify(bundle: Path, run: bool, as_json: bool) -> None:
    """Check every file of a BUNDLE, and its golden values through what runs its graphs.

    Engines are run with --run alone.

    \b
    Example:
      lltk bundle verify bundle
      lltk bundle verify engines --run
    """
    from lltk.export.bundle import verify_bundle

    found = verify_bundle(bundle, run)
    if as_json:
        told = {"golden": [each.plain() for each in found.golden], "engines_run": run}
        click.echo(json.dumps(told, indent=2))
        return
    console = Console()
    if found.golden:
        console.print(row_table("Golden values", [each.row() for each in found.golden], 2))
    if found.engines and not run:
        console.print(f"{NOT_RUN} On the GPU that they are for: lltk bundle verify {bundle} --run")
