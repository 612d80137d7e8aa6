"""``lltk export``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from lltk.cli.engines import NOT_RUN, print_engines
from lltk.cli.options import download_option, overwrite_option
from lltk.cli.tables import memory_table, row_table
from lltk.graph.recipe_files import find_recipe

if TYPE_CHECKING:
    from lltk.exporting import Text


@click.command("export")
@click.argument("source", metavar="RECIPE|PROGRAM")
@click.option(
    "--target", required=True, type=click.Choice(["ort", "tensorrt-rtx"]),
    help="What is to run the graphs: ONNX Runtime, or TensorRT for RTX, which has engines.",
)  # fmt: skip
@click.option(
    "--sm", type=int,
    help="The compute capability that engines are for, without its point: 120 is 12.0.",
)  # fmt: skip
@click.option(
    "--waive", multiple=True, metavar="MODULE",
    help="A module that may run slower than it is meant to in an engine; may be repeated.",
)  # fmt: skip
@click.option(
    "--attention", type=click.Choice(["native", "plugin"]),
    help="What attends in engines: TensorRT (the default), which decodes all pages in NVFP4; or a "
    "plugin, which decodes those that are listed.",
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
@click.option(
    "--dry-run", is_flag=True,
    help="Emit the graphs without weights, and say what engines take to build; write nothing.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: str,
    target: str,
    sm: int | None,
    waive: tuple[str, ...],
    attention: str | None,
    output: Path,
    overrides: tuple[str, ...],
    text: Text,
    download: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the graphs of a RECIPE's stream in ONNX, as a bundle.

    A PROGRAM is a folder that `lltk transform` wrote. Its recipe and weights are exported; the
    decoder and the text encoder are those of the recipe's pipeline.

    A bundle holds the transformer's and the decoder's graphs, their weights, and golden values:
    inputs of each graph, and what torch makes of them. It is written once ONNX Runtime gives the
    same; `lltk stream` then plays it. For ONNX Runtime lltk exports float32.

    For TensorRT for RTX it exports bfloat16, and builds an engine of each graph for one kind of
    GPU. This needs no GPU. Nothing runs the engines here: their layers are looked at, and a product
    in FP4 or FP8 or an attention without a fast kernel is an error.

    \b
    Example:
      lltk export tiny_stream --target ort -o bundle
      lltk export wan22_5b_stream_nvfp4 --target tensorrt-rtx --sm 120 --text reference -o engines
      lltk transform tiny_stream -o program; lltk export program --target ort -o bundle
      lltk bundle verify bundle
      lltk stream bundle --prompt "a red circle moving right" -o red.mp4
    """
    console = Console(quiet=as_json)
    from lltk.artefact import PROGRAM, load_program
    from lltk.cli.inputs import inputs_of, located
    from lltk.export.engines import EngineOrder, build_costs, build_memory, build_seconds
    from lltk.export.facts import BUNDLE, TENSORRT_RTX
    from lltk.exporting import emitted, export, plan_export
    from lltk.files.outputs import Output, check_outputs
    from lltk.graph.memory import estimate
    from lltk.graph.recipe import parse_recipe
    from lltk.stream.runtimes import onnx_graph, tensorrt

    order = None
    if target == TENSORRT_RTX:
        if sm is None:
            raise ValueError("--sm: engines are for one kind of GPU; name it, such as --sm 120")
        order = EngineOrder(sm, waive, attention == "plugin")
    elif given := [
        name
        for name, value in (("--sm", sm), ("--waive", waive), ("--attention", attention))
        if value
    ]:
        option = given[0]
        raise ValueError(f"{option}: is for engines; drop it, or use --target {TENSORRT_RTX}")
    program = None
    if PROGRAM.recognises(Path(source)):
        if overrides:
            raise ValueError(f"--set: {source} is a Program, which has its recipe; drop it")
        path, program = Path(source), load_program(Path(source))
        if not dry_run and any(weight.is_meta for weight in program.weights.values()):
            raise ValueError(f"{source}: has no weights; transform its recipe without --no-weights")
        resolved = parse_recipe(program.recipe, source)
    else:
        path = find_recipe(source)
        resolved = located(path, overrides, download, not dry_run)
    onnx_graph.check_installed()
    if order and not dry_run:
        tensorrt.check_installed()
    check_outputs([Output(output, BUNDLE)], inputs_of(path, resolved.resolved()), overwrite)
    start = time.perf_counter()
    with console.status("making the Programs") as status:

        def note(what: str) -> None:
            """Say what is being done; where the console is no terminal, as a line."""
            status.update(what)
            if not console.is_terminal:
                console.print(what, highlight=False, soft_wrap=True)

        plan = plan_export(resolved, weights=not dry_run, text=text, program=program, engines=order)
        if dry_run:
            graphs = emitted(plan)
        else:
            found = export(plan, output, overwrite, note)
    if dry_run:
        memory = {name: estimate(program) for name, program in plan.stages.items()}
        if as_json:
            nodes = {name: each.nodes for name, each in graphs.items()}
            facts = {"target": target, "nodes": nodes, "memory": memory, "outputs": [str(output)]}
            facts["engines"] = {
                name: {
                    "seconds": build_seconds(each.weights),
                    "peak_bytes": build_memory(each.weights),
                }
                for name, each in graphs.items()
                if each.engine
            }
            click.echo(json.dumps(facts, indent=2))
        rows = [{"graph": name, "nodes": str(each.nodes)} for name, each in graphs.items()]
        if order:
            for row, each in zip(rows, graphs.values(), strict=True):
                row["to build its engine"] = build_costs(each.weights) if each.engine else ""
        console.print(row_table(f"It would write {output}", rows))
        for name, owners in memory.items():
            console.print(f"{name}:", memory_table(owners), sep="\n")
        return
    seconds = time.perf_counter() - start
    if as_json:
        cases = [each.plain() for each in found.golden]
        engines = found.engines and found.engines.model_dump(mode="json")
        told = {"output": str(output), "seconds": seconds, "golden": cases, "engines": engines}
        click.echo(json.dumps(told))
    if found.engines:
        print_engines(console, found.engines)
        console.print(f"{NOT_RUN} On the GPU that they are for: lltk bundle verify {output} --run")
    if found.golden:
        console.print(row_table("Golden values", [each.row() for each in found.golden], 2))
    console.print(f"A bundle for {target} in {seconds:.1f} s, written to {output}")
