"""``lltk distil``."""

from __future__ import annotations

from typing import Any

import click

from lltk.cli.train import run, run_options


@click.command("distil")
@run_options
def command(**options: Any) -> None:
    """Distil a stream into one of few passes by a RECIPE.

    RECIPE is a YAML file, or the name of a recipe that comes with lltk. It needs a distil section
    beside stream and train. The student, the real and the fake score hold equal weights once.
    Adapters (LoRA) of the student and of the fake score train.

    The run's folder gets training states (in checkpoints/), metrics.jsonl with both losses,
    loss.svg and train.log, and at the end lora.safetensors, the student's adapter in diffusers'
    layout: the averaged one, if the recipe averages.

    Exit codes, Ctrl-C and --resume are as for lltk train.

    \b
    Example:
      lltk distil tiny_distil -o runs/two
      lltk stream tiny_stream --lora runs/two/lora.safetensors --set stream.steps=2 -o two.mp4
      lltk distil tiny_distil --set distil.steps=[4] -o runs/four --resume
    """
    run(**options, distils=True)
