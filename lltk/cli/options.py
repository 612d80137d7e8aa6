"""Options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click


class NamedPath(click.ParamType[Path]):
    """A path that ends in a name, from which the names of more files are made."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.name in ("", ".."):
            self.fail(f"{str(value)!r} does not end in a name; write one", param, ctx)
        return path


class FiniteRange(click.FloatRange):
    """A number in a range, which no bound keeps from being nan or infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number; write one", param, ctx)
        return number


overwrite_option = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace what is in the place of an output, also if lltk did not write it.",
)
download_option = click.option(
    "--download",
    is_flag=True,
    help="Download what the recipe names on the Hugging Face hub, as OWNER/NAME.",
)
device_option = click.option("--device", help="Where it runs (default: a GPU if there is one).")
provider_option = click.option(
    "--provider",
    metavar="NAME",
    help="For a bundle: ONNX Runtime's execution provider (default: CPUExecutionProvider).",
)
