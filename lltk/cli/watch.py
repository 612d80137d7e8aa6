"""``lltk watch``."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.console import Console

from lltk.cli.options import FiniteRange


@click.command("watch")
@click.argument("url")
@click.option("--prompt", required=True, help="What the stream shows.")
@click.option("--seconds", type=FiniteRange(0.1), help="Its length (default: the server's limit).")
@click.option("--seed", type=click.IntRange(0), help="Of the noise (default: the recipe's).")
@click.option("--token", help="The server's token.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="MP4 to write.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def command(
    url: str,
    prompt: str,
    seconds: float | None,
    seed: int | None,
    token: str | None,
    output: Path | None,
    overwrite: bool,
) -> None:
    """Watch a live stream of the server at URL, at the pace at which it would play.

    Prints a line a chunk: when it came, and how much was buffered then.

    \b
    Example:
      lltk watch http://127.0.0.1:8000 --prompt "a red circle moving right" --seconds 10 -o red.mp4
    """
    from contextlib import ExitStack

    from lltk.serve.watching import watch

    if output is not None and output.suffix.lower() != ".mp4":
        raise ValueError(f"-o: {output}: a server sends MP4, whatever the codec; name it .mp4")
    if output is not None and output.exists() and not overwrite:
        raise ValueError(f"-o: {output} exists; name a new file, or replace it with --overwrite")
    console = Console()
    begun = time.monotonic()
    with ExitStack() as stack:
        file = None
        for chunk in watch(url, token, prompt, seed, seconds):
            if output is not None:
                file = file or stack.enter_context(open(output, "wb"))
                file.write(chunk.data)
            made = chunk.metadata
            if made is not None:
                console.print(
                    f"{time.monotonic() - begun:7.2f} s  chunk {made.generation_chunk_index}, "
                    f"frame {made.first_frame}, {len(chunk.data)} bytes, "
                    f"{chunk.buffered:.2f} s buffered",
                    highlight=False,
                )
