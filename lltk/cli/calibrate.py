"""``lltk calibrate``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from lltk.cli.options import device_option, download_option, overwrite_option
from lltk.graph.recipe_files import find_recipe

_MARK = "# Written by lltk calibrate"
_File = click.Path(path_type=Path)


@click.command("calibrate")
@click.argument("recipe")
@click.option("--script", type=_File, help="Shot script that is streamed to record magnitudes.")
@click.option(
    "--checkpoint", type=_File,
    help="A calibrated checkpoint in NVFP4, such as modelopt's, whose scales are taken instead.",
)  # fmt: skip
@click.option("-o", "--output", type=_File, required=True, help="The recipe to write, in YAML.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a key of the recipe; may be repeated.",
)  # fmt: skip
@device_option
@download_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Check the recipe and the script; stream nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the scales as JSON.")
def command(
    recipe: str,
    script: Path | None,
    checkpoint: Path | None,
    output: Path,
    overrides: tuple[str, ...],
    device: str | None,
    download: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find constant scales for what the quantised linears of a RECIPE's stream read.

    The stream runs without quantised linears, and the largest magnitude that each of them reads
    gives its scale. The recipe that is written is the same with these scales, in place of scales
    that follow from the values as they come; an engine has less to compute with them. Activations
    are rounded plainly in it (activation_rule: none), as calibrated scales need it.

    \b
    Example:
      lltk calibrate tiny_stream_w4a4 --script shots.yaml -o calibrated.yaml
      lltk calibrate my.yaml --checkpoint modelopt_export -o calibrated.yaml
      lltk compare tiny_stream_w4a4 calibrated.yaml
    """
    import yaml

    from lltk.calibrating import calibrated, check_calibratable, check_scales, record_scales
    from lltk.cli.inputs import inputs_of, located
    from lltk.files.outputs import Output, check_outputs, marked
    from lltk.files.writing import write_text
    from lltk.models.checkpoint import load_checkpoint
    from lltk.parallel.devices import find_device
    from lltk.stream.recipe import stream_section
    from lltk.stream.script import load_script

    console = Console(quiet=as_json)
    if (script is None) == (checkpoint is None):
        raise ValueError("name where scales come from: one of --script and --checkpoint")
    path = find_recipe(recipe)
    resolved = located(path, overrides, download, not dry_run)
    check_calibratable(resolved)
    inputs = [*inputs_of(path, resolved.resolved()), *filter(None, (script, checkpoint))]
    if checkpoint is not None:
        inputs += checkpoint.glob("*")
    check_outputs([Output(output, marked("a calibrated recipe", _MARK))], inputs, overwrite)
    if script is not None:
        shots, place = load_script(script), find_device(device)
        steps = stream_section(resolved.stream, str(path)).steps
        if dry_run:
            said = {"output": str(output), "shots": len(shots), "steps": steps}
            if as_json:
                click.echo(json.dumps(said | {"device": str(place)}))
            console.print(
                f"It would stream {len(shots)} shots in {steps} passes a chunk on {place}, and "
                f"write {output}"
            )
            return
        with console.status("streaming") as status:
            scales = record_scales(
                resolved, shots, place, lambda made: status.update(f"chunk {made.chunk.index}")
            )
    else:
        assert checkpoint is not None
        if device is not None:
            raise ValueError("--device: a checkpoint's scales are only read; drop it")
        found = load_checkpoint(checkpoint)
        scales = found.input_scales
        if not scales:
            raise ValueError(
                f"{checkpoint}: has no calibrated scales; calibrate it with the library that made "
                "it, or record scales with --script"
            )
        check_scales(resolved, found, str(checkpoint))
        if dry_run:
            if as_json:
                click.echo(json.dumps({"output": str(output), "scales": len(scales)}))
            console.print(f"It would write {len(scales)} scales to {output}")
            return
    text = yaml.safe_dump(calibrated(resolved.resolved(), scales), sort_keys=False)
    write_text(output, f"{_MARK}, from {recipe}.\n{text}")
    if as_json:
        click.echo(json.dumps({"output": str(output), "input_scales": scales}))
    console.print(
        f"{len(scales)} scales, written to {output}; activations are rounded plainly there "
        "(activation_rule: none)"
    )
