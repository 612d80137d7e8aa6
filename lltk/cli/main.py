"""The ``lltk`` command."""

from __future__ import annotations

import sys
from importlib import import_module

import click
from rich.console import Console

from lltk import __version__

_COMMANDS = (
    "doctor", "recipes", "transform", "inspect", "prepare", "train", "distil", "calibrate",
    "export", "bundle", "stream", "serve", "watch", "compare", "bench", "demo",
)  # fmt: skip


class _Lazy(click.Group):
    """A group that imports a command's file only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"lltk.cli.{cmd_name}").command
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lltk")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Compile video diffusion transformers for training and streaming."""
    ctx.obj = debug


def main() -> None:
    """Run the command. An expected error ends it with one message and exit code 2."""
    debug = "--debug" in sys.argv
    try:
        cli.main(standalone_mode=True)
    except (ValueError, OSError, RuntimeError) as error:
        if debug or not _is_expected(error):
            raise
        Console(stderr=True).print(f"[red]error:[/red] {_plain(error)}", soft_wrap=True)
        sys.exit(2)


def _is_expected(error: Exception) -> bool:
    """Whether the message says all that a user needs.

    Of torch's RuntimeErrors that is true only of a GPU that has run out of memory.
    """
    if not isinstance(error, RuntimeError):
        return True
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError)


def _plain(error: Exception) -> str:
    text = str(error).encode("utf-8", "backslashreplace").decode().replace("[", r"\[")
    if isinstance(error, RuntimeError):
        return (
            f"memory: {text}\nLook at the planned memory with --dry-run, and choose smaller sizes."
        )
    return text
