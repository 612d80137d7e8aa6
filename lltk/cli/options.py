"""Options that several commands have."""

from __future__ import annotations

import click

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
