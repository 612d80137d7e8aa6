"""``lltk recipes``."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console

from lltk.cli.tables import row_table
from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import sentence, shipped


@click.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def command(as_json: bool) -> None:
    """List the recipes that come with lltk, with the command that runs each.

    \b
    Example:
      lltk recipes
    """
    rows = [
        {"recipe": name, "command": _command(read_recipe(path)), "what for": sentence(path)}
        for name, path in shipped().items()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    Console().print(row_table("Recipes", rows))


def _command(recipe: dict[str, Any]) -> str:
    """The command that a recipe is for."""
    if recipe.get("distil"):
        return "lltk distil"
    if recipe.get("train"):
        return "lltk train"
    return "lltk stream" if recipe["program"] == "stream" else "lltk transform"
