"""``lltk inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.syntax import Syntax

from lltk.cli.options import overwrite_option
from lltk.cli.tables import contract_table, log_tables, memory_table


@click.command("inspect")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--graph", metavar="NAME", help="The graph or region to print (default: the first block's)."
)
@click.option(
    "--joint",
    is_flag=True,
    help="Print the block's forward and backward pass; for a Program that trains.",
)
@click.option("--diagram", type=click.Path(path_type=Path), help="SVG file to draw that graph to.")
@overwrite_option
@click.option(
    "--json", "as_json", is_flag=True, help="Print the pass log, inputs and outputs as JSON."
)
def command(
    directory: Path,
    graph: str | None,
    joint: bool,
    diagram: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show the Program in a DIRECTORY.

    Shows its stage, the passes that it went through, the inputs and outputs of its graphs, the
    memory that it needs, and one graph. `lltk transform -o DIRECTORY` writes such a directory.

    \b
    Example:
      lltk inspect program
      lltk inspect program --graph step_block --diagram step_block.svg
      lltk inspect trained --joint
    """
    from lltk.artefact import load_program
    from lltk.files.outputs import Output, check_outputs
    from lltk.files.writing import write_text
    from lltk.graph.diagram import DIAGRAM, draw
    from lltk.graph.joint import joint_graph
    from lltk.graph.memory import estimate
    from lltk.graph.text import print_graph

    console = Console(quiet=as_json)
    if diagram is not None:
        inside = [directory, *(path for path in directory.rglob("*"))]
        check_outputs([Output(diagram, DIAGRAM)], inside, overwrite)
    with console.status("repeating the recipe's passes"):
        program = load_program(directory)
    graphs = dict(program.every_graph())
    blocks = [name for name, region in program.regions.items() if not region.once_a_prompt]
    name = graph or (blocks or list(graphs))[0]
    if name not in graphs:
        raise ValueError(f"--graph {name}: the program has {', '.join(graphs)}")
    if joint:
        if program.kind != "train":
            raise ValueError(f"--joint: a {program.kind} program has no backward")
        if name not in program.regions:
            raise ValueError(f"--joint: {name} is no region; name one of {', '.join(blocks)}")
        graphs[name] = joint_graph(program.regions[name])
    if diagram is not None:
        write_text(diagram, draw(graphs[name], name))
    contracts = {each: program.contract(each) for each in program.graphs}
    if as_json:
        described = {
            "stage": str(program.stage),
            "kind": program.kind,
            "recipe": program.recipe,
            "log": [entry.plain() for entry in program.log],
            "contracts": {
                each: {
                    side: {
                        key: {"shape": spec.shape, "dtype": str(spec.dtype)}
                        for key, spec in specs.items()
                    }
                    for side, specs in (("inputs", contract.inputs), ("outputs", contract.outputs))
                }
                for each, contract in contracts.items()
            },
            "graph": print_graph(graphs[name], name) if graph or joint else None,
        }
        click.echo(json.dumps(described, indent=2))
        return
    console.print(f"{directory}: a {program.stage} {program.kind} program")
    console.print(log_tables(program.log))
    for each, contract in contracts.items():
        console.print(contract_table(each, contract))
    console.print(memory_table(estimate(program)))
    console.print(f"Graph {name} (of {', '.join(graphs)}):")
    console.print(Syntax(print_graph(graphs[name], name), "python", word_wrap=True))
    if diagram is not None:
        console.print(f"Diagram written to {diagram}")
