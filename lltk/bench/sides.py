"""Processes over different checkouts that measure in turns, such as an older and this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Ask = Callable[[str], Any]
"""Sends a process one line; what it answers."""


@contextmanager
def side(script: Path, checkout: Path, options: Mapping[str, Any]) -> Iterator[Ask]:
    """A process that runs a script over the lltk of a checkout, and what asks it.

    It gets ready while others do, until it is asked for the first time.

    Args:
        script: answers each line of its input by a line of JSON. It may only import what all
            checkouts have.
        checkout: the folder that holds ``lltk``.
        options: the script's only argument, as JSON.

    Raises:
        ValueError: there is no lltk, or, from asking, the process has ended.
    """
    if not (checkout / "lltk").is_dir():
        raise ValueError(f"{checkout}: holds no lltk; name a checkout (git worktree add makes one)")
    with subprocess.Popen(
        [sys.executable, str(script), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # nothing is left to write to a process that has ended
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout.resolve()), *sys.path])},
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None and answers is not None

        def ask(line: str) -> Any:
            with suppress(BrokenPipeError):
                asked.write(f"{line}\n".encode())
            if not (answer := answers.readline()):
                raise ValueError(f"{checkout}: its process failed; see the error above")
            return json.loads(answer)

        yield ask
        asked.close()


def in_turns(
    sides: Mapping[str, Callable[[], dict[str, Any]]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """What each side measured, by its ``median_ms``; every other round goes backwards."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for index in range(rounds):
        order = list(sides.items())
        for name, measure in order if index % 2 == 0 else reversed(order):
            found[name].append(measure())
    return {name: sorted(each, key=lambda r: r["median_ms"]) for name, each in found.items()}
