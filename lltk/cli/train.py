"""``lltk train``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from lltk.cli.bars import Bars, Steps, shown_progress
from lltk.cli.logs import LOG, logged
from lltk.cli.options import FiniteRange, download_option, overwrite_option
from lltk.cli.stopping import stopping
from lltk.cli.tables import log_tables, memory_table
from lltk.graph.recipe_files import find_recipe

if TYPE_CHECKING:
    from lltk.parallel.ranks import Ranks
    from lltk.training import TrainingPlan

_LOG = "train.log"


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a training run, as `run` takes them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.argument("recipe"),
    click.option("-o", "--output", type=click.Path(path_type=Path), help="The run's folder."),
    click.option(
        "--resume", is_flag=True,
        help="Go on from the newest training state in the folder, if there is one.",
    ),
    click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE",
        help="Change a key of the recipe; may be repeated.",
    ),
    download_option,
    overwrite_option,
    click.option("--device", help="Where it trains (default: a GPU if there is one)."),
    click.option("--dry-run", is_flag=True, help="Show the plan and its memory; train nothing."),
    click.option(
        "--device-memory", type=FiniteRange(min=0, min_open=True), metavar="GIB",
        help="With --dry-run: what a device has (default: what this one has left).",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)  # fmt: skip


@click.command("train")
@run_options
@click.option("--from-scratch", is_flag=True, help="Begin with random weights.")
def command(**options: Any) -> None:
    """Train a model by a RECIPE.

    RECIPE is a YAML file, or the name of a recipe that comes with lltk. It needs a train section.
    A recipe with a vae section trains an autoencoder; any other trains its transformer.

    The run's folder gets training states (in checkpoints/), metrics.jsonl, loss.svg and train.log.
    At the end it gets the weights in diffusers' layout: the averaged ones, if the recipe averages.

    The exit code is 1 if the loss is no longer a number, the disk is full, or the run is
    interrupted. Ctrl-C, or a kill, keeps a training state after the step in flight; a second one
    ends the run at once. --resume then goes on from the newest training state.

    \b
    Example:
      lltk train tiny_vae -o runs/vae
      lltk train tiny_train --set train.data.pipeline=tiny -o runs/tiny --resume
      lltk train my.yaml --set model.checkpoint=OWNER/NAME --download -o runs/mine
      torchrun --nproc-per-node 4 -m lltk train my.yaml -o runs/four
    """
    run(**options, distils=False)


def run(
    recipe: str,
    output: Path | None,
    resume: bool,
    overrides: tuple[str, ...],
    download: bool,
    overwrite: bool,
    device: str | None,
    dry_run: bool,
    device_memory: float | None,
    as_json: bool,
    distils: bool,
    from_scratch: bool = False,
) -> None:
    """Train, or show the plan.

    Args:
        recipe: its name or its file.
        output, resume, overrides, download, overwrite, device: the options.
        dry_run, device_memory, as_json, from_scratch: likewise.
        distils: whether it is a recipe with a ``distil`` section.
    """
    if device_memory is not None and not dry_run:
        raise ValueError("--device-memory: only a plan is compared with it; add --dry-run")
    from lltk.cli.inputs import inputs_of
    from lltk.files.outputs import Output, check_outputs
    from lltk.graph.memory import available, readable, total
    from lltk.graph.recipe import read_recipe
    from lltk.models.hub import on_disk
    from lltk.parallel.ranks import joined
    from lltk.train.loop import newest_state
    from lltk.train.recipe import train_section
    from lltk.training import plan_training, training_outputs

    with joined(device) as ranks:
        console = Console(quiet=as_json or ranks.rank > 0)
        path, state = find_recipe(recipe), None
        scratch = ["train.from_scratch=true"] if from_scratch else []
        data = read_recipe(path, (*overrides, *scratch))
        if from_scratch and (data.get("model") or {}).get("checkpoint") is not None:
            raise ValueError("--from-scratch: the recipe names model.checkpoint; drop one of them")
        if distils != bool(data.get("distil")):
            raise ValueError(
                f"{path}: has no distil section; train it with lltk train"
                if distils
                else f"{path}: has a distil section; use lltk distil"
            )
        train_section(data.get("train"), str(path))  # before anything is looked for
        data = on_disk(data, download)
        if output is None and (resume or not dry_run):
            raise ValueError("-o: name a folder for the run")
        if output is not None and ranks.rank == 0:
            written = [*training_outputs(output), Output(output / _LOG, LOG)]
            check_outputs(written, inputs_of(path, data), overwrite)
            state = newest_state(output, resume)
        with console.status("reading the recipe"):
            plan = plan_training(data, ranks.device, str(path))
        section = plan.section
        if plan.log:
            console.print(log_tables(plan.log))
        console.print(f"Weights to begin with: {plan.origin}", highlight=False)
        if not dry_run:
            assert output is not None
            steps, weights = _train(plan, output, resume, overwrite, console, ranks)
            if as_json and weights is not None:
                click.echo(json.dumps({"steps": steps, "weights": str(weights)}, indent=2))
            console.print(f"{steps} steps; the weights are in {weights}")
            return
        if ranks.rank == 0:
            plan.check_clips()
            if output is not None:
                newest_state(output, resume, plan.about)
        room = available(ranks.device) if device_memory is None else round(device_memory * 2**30)
        fits = total(plan.memory) <= room
        ways = [] if fits else list(plan.ways_to_fit(room))
        if as_json and ranks.rank == 0:
            facts = {
                "device": str(ranks.device),
                "weights": plan.origin,
                "train": section.model_dump(mode="json"),
                "log": [entry.plain() for entry in plan.log],
                "ranks": {"sequence": plan.sequence, "shards": section.shards},
                "memory": plan.memory,
                "fits": {"available": room, "as_is": fits, "ways": ways},
                "resume": {"asked": resume, "state": None if state is None else str(state)},
            }
            click.echo(json.dumps(facts, indent=2))
        console.print(f"Plan: {section.steps} steps of {section.batch} clips on {ranks.device}")
        if (count := math.lcm(plan.sequence, section.shards)) > 1:
            console.print(
                f"Ranks: {count} or a multiple; {plan.sequence} share a clip, {section.shards} "
                "the weights. Memory is that of a rank."
            )
        if output is not None:
            begins = "begin, as there is no training state" if resume else "begin"
            console.print(f"It would {begins if state is None else f'go on from {state}'}")
        console.print(memory_table(plan.memory))
        if not fits:
            would = "".join(f"\n  {way}" for way in ways) or " nothing that is known"
            console.print(
                f"A device has {readable(room)}, which is too little. What would do:{would}",
                highlight=False,
            )


def _train(
    plan: TrainingPlan,
    output: Path,
    resume: bool,
    overwrite: bool,
    console: Console,
    ranks: Ranks,
) -> tuple[int, Path | None]:
    """Train with a progress bar; the steps done and what this rank wrote in the end."""
    from lltk.train.loop import Diverged
    from lltk.training import open_training

    with ExitStack() as opened:
        keep_log = opened.enter_context(logged(Console(stderr=True)))
        bars = opened.enter_context(shown_progress(console))
        note = Bars(bars)
        note("preparing", 0, 1)
        run = opened.enter_context(
            open_training(plan, output, resume=resume, note=note, overwrite=overwrite, ranks=ranks)
        )
        note("preparing", 1, 1)
        if ranks.rank == 0:
            keep_log(output / _LOG)
        steps = Steps(bars, run.trainer.step, plan.section.steps)
        stop = opened.enter_context(stopping())
        try:
            for metrics in run:
                text = f"loss {metrics.loss:.4g}, {metrics.samples_per_second:.3g} clips/s"
                steps(metrics.step, text)
                if metrics.step < plan.section.steps and ranks.any(stop.asked):
                    with stop.keeping():
                        run.trainer.save()
                    raise click.ClickException(f"stopped; {run.trainer.left()}")
        except Diverged as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"{error}; {run.trainer.left()}") from error
    return run.trainer.step, run.export()
