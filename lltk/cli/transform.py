"""``lltk transform``."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
from rich.console import Console

from lltk.cli.inputs import inputs_of, located
from lltk.cli.options import download_option, overwrite_option
from lltk.cli.tables import log_tables, memory_table
from lltk.files.manifest import Manifest
from lltk.files.outputs import Kind, Output, check_outputs
from lltk.graph.recipe_files import find_recipe

_DUMPED = Manifest("dump.json", "a Program's graphs", format=1, remedy="dump them again")
_DUMP = Kind("a dump", lambda folder: all(map(_DUMPED.recognises, folder.iterdir())), folder=True)


@click.command("transform")
@click.argument("recipe")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write the Program to."
)
@click.option("--no-weights", is_flag=True, help="Transform only the graphs; read no checkpoint.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a key of the recipe; may be repeated.",
)  # fmt: skip
@click.option(
    "--dump", type=click.Path(path_type=Path),
    help="Folder to write the graphs to, as they are after each pass.",
)  # fmt: skip
@click.option("--stop-after", metavar="PASS", help="Run the passes up to this one.")
@click.option("--disable", multiple=True, metavar="PASS", help="Leave a pass out; may be repeated.")
@download_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory; run no pass.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: str,
    output: Path | None,
    no_weights: bool,
    overrides: tuple[str, ...],
    dump: Path | None,
    stop_after: str | None,
    disable: tuple[str, ...],
    download: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Turn a model into a Program by a RECIPE.

    RECIPE is a YAML file, or the name of a recipe that comes with lltk. The command captures its
    model, runs its passes, and shows what each pass did and what memory the Program needs.

    \b
    Example:
      lltk transform wan22_5b_stream --no-weights -o program
      lltk transform my.yaml --set geometry.window=24 --dump passes -o program
    """
    console = Console(quiet=as_json)
    path = find_recipe(recipe)
    needed = not (dry_run or no_weights)
    resolved = located(path, overrides, download, needed)
    from lltk.artefact import PROGRAM, save_program
    from lltk.compiler import fitting, transform
    from lltk.files.writing import remove_whole, whole_folder
    from lltk.graph.memory import estimate
    from lltk.graph.program import Program
    from lltk.graph.text import print_graph

    kinds = ((output, PROGRAM), (dump, _DUMP))
    written = [Output(place, kind) for place, kind in kinds if place is not None]
    check_outputs(written, inputs_of(path, resolved.resolved()), overwrite)
    if dry_run:
        planned = transform(
            resolved,
            weights=False,
            stop_after=stop_after,
            disable=disable,
            observe=None if no_weights else fitting(resolved),
        )
        source = "none" if no_weights else str(resolved.model.checkpoint)
        places = [str(each.path) for each in written]
        owners, names = estimate(planned), [entry.name for entry in planned.log]
        if as_json:
            facts = {"passes": names, "memory": owners, "weights": source, "outputs": places}
            click.echo(json.dumps(facts, indent=2))
        console.print("Plan: capture, " + ", ".join(names))
        console.print(f"Weights: {source}", highlight=False)
        if places:
            console.print(f"It would write {', '.join(places)}", highlight=False)
        console.print(memory_table(owners))
        return

    start = time.perf_counter()

    def observe(program: Program) -> None:
        number = len(program.log)
        name = program.log[-1].name if program.log else "captured"
        status.update(f"{name} done ({time.perf_counter() - start:.0f} s)")
        if dump is not None:
            if not program.log and dump.exists():  # of an earlier command, of other passes
                remove_whole(dump.resolve())
            with whole_folder(dump / f"{number:02d}_{name}") as folder:
                for graph_name, graph in program.every_graph():
                    folder.write_text(f"{graph_name}.txt", print_graph(graph, graph_name))
                _DUMPED.write(folder, {})

    with console.status("capturing") as status:
        program = transform(
            resolved,
            weights=not no_weights,
            stop_after=stop_after,
            disable=disable,
            observe=observe,
        )
        if output is not None:
            status.update("writing")
            save_program(program, output, overwrite)
    seconds = time.perf_counter() - start
    if as_json:
        log = [entry.plain() for entry in program.log]
        click.echo(
            json.dumps(
                {"stage": str(program.stage), "seconds": seconds, "log": log,
                 "output": None if output is None else str(output)},
                indent=2,
            )
        )  # fmt: skip
    console.print(log_tables(program.log))
    console.print(memory_table(estimate(program)))
    where = f", written to {output}" if output is not None else ""
    console.print(f"A {program.stage} {program.kind} program in {seconds:.1f} s{where}")
