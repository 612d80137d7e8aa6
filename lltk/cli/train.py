"""``lltk train``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lltk.cli.logs import hide_loading, logged
from lltk.cli.tables import log_tables, memory_table
from lltk.graph.recipe_files import find_recipe
from lltk.parallel.devices import find_device

if TYPE_CHECKING:
    from lltk.cli.tasks import Task
    from lltk.train.metrics import Metrics


@click.command("train")
@click.argument("recipe")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on from the folder's newest checkpoint, if any.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--device", help="Where it trains (default: a GPU if there is one).")
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: str,
    output: Path | None,
    resume: bool,
    overrides: tuple[str, ...],
    device: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train by a RECIPE with a train section (a YAML file, or a shipped recipe's name).

    A recipe with a vae section trains an autoencoder, any other its transformer. The run's folder
    gets checkpoints, metrics.jsonl, loss.svg, train.log and, in the end, the weights in diffusers'
    layout (the averaged ones where the recipe averages). Ends with 1 if the loss is no longer a
    number, the disk is full, or it is interrupted; --resume goes on from the last checkpoint.

    \b
    Example:
      lltk train tiny_vae -o runs/vae
      lltk train tiny_train --set train.data.pipeline=tiny -o runs/tiny --resume
    """
    console = Console(quiet=as_json)
    path = find_recipe(recipe)

    from lltk.cli.tasks import task_of
    from lltk.graph.recipe import read_recipe

    chosen = find_device(device)
    hide_loading()
    with console.status("reading the recipe"):
        task = task_of(read_recipe(path, overrides), str(path), chosen)
    section = task.section
    if task.log:
        console.print(log_tables(task.log))
    if dry_run:
        if as_json:
            plan = {
                "device": str(chosen),
                "train": section.model_dump(mode="json"),
                "log": [entry.plain() for entry in task.log],
                "memory": task.memory,
            }
            click.echo(json.dumps(plan, indent=2))
        console.print(f"Plan: {section.steps} steps of {section.batch} clips on {chosen}")
        console.print(memory_table(task.memory))
        return
    if output is None:
        raise ValueError("-o: name a folder for the run")
    with logged(Console(stderr=True)) as keep_log:
        _train(task, output, resume, as_json, console, keep_log)


def _train(
    task: Task,
    output: Path,
    resume: bool,
    as_json: bool,
    console: Console,
    keep_log: Callable[[Path], None],
) -> None:
    import torch

    from lltk.cli.tasks import held_out_loss
    from lltk.train.loop import Diverged, Hooks, Trainer

    section = task.section
    with console.status("preparing"):
        dataset, objective = task.dataset(), task.objective()

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=section.steps)

        def observe(metrics: Metrics) -> None:
            text = f"loss {metrics.loss:.4g}, {metrics.samples_per_second:.3g} clips/s"
            progress.update(bar, completed=metrics.step, description=text)

        def validate(step: int) -> dict[str, float]:
            return {"loss": held_out_loss(objective, dataset, section)}

        def sample(step: int, folder: Path) -> None:
            assert task.sample is not None
            task.sample(objective, dataset, folder)

        hooks = Hooks(observe, validate, sample if task.sample else None)
        run = Trainer(objective, dataset, section, output, task.about, hooks, resume)
        keep_log(output / "train.log")
        progress.update(bar, completed=run.step)
        try:
            # Shapes stay, so the fastest convolutions are worth looking for.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                run.run()
        except Diverged as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"{error}; {run.left()}") from error
        except KeyboardInterrupt:
            raise click.ClickException(f"stopped; {run.left()}") from None
    exported = task.export(objective, dataset, run.ema or run.weights, output)
    if as_json:
        click.echo(json.dumps({"steps": run.step, "weights": str(exported)}, indent=2))
    console.print(f"{run.step} steps; the weights are in {exported}")
