"""What the scripts in ``benchmarks/`` share: options, the command in a record, columns."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lltk.bench.record import Record, make_record, record_outputs
from lltk.files.outputs import Output, check_outputs
from lltk.train.plot import SVG

_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF",)
"""Variables of torch's that change what is measured; a record's command has those that are set."""


def script_parser(
    script: str, description: str, runs: int | None = None, device: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options that most scripts have: --device, --runs, --output and --overwrite.

    Args:
        script: the script's ``__file__``. The record goes to ``records/`` beside it by default.
        description: the script's docstring.
        runs: the default of ``--runs``; None leaves the option out.
        device: whether there is a ``--device``.
    """
    path = Path(script)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if device:
        parser.add_argument("--device", default="cuda", help="where to measure (default: cuda)")
    if runs is not None:
        parser.add_argument("--runs", type=int, default=runs, help=f"how often (default: {runs})")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=path.parent / "records" / path.stem,
        help=f"the record's path without a suffix (default: benchmarks/records/{path.stem})",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace outputs that lltk did not write, too"
    )
    return parser


def script_options(parser: argparse.ArgumentParser, plot: str | None = None) -> argparse.Namespace:
    """The running script's options. Ends the script if an output may not be written.

    Args:
        parser: `script_parser`'s, with what the script has added.
        plot: how the name of a plot beside the record ends; None if there is none.
    """
    options = parser.parse_args()
    outputs = record_outputs(options.output)
    if plot is not None:
        outputs.append(Output(beside_record(options.output, plot), SVG))
    try:
        check_outputs(outputs, [], options.overwrite)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options


def beside_record(path: Path, ending: str) -> Path:
    """A file whose name begins as the record's; ``path`` is the record's without a suffix."""
    return path.with_name(path.name + ending)


def script_record(
    benchmark: str, method: str, results: Iterable[Mapping[str, Any]], ranks: int = 1
) -> Record:
    """A record of what the running script measured.

    Args:
        benchmark: the script's name without ``.py``.
        method: what was measured; line breaks become spaces.
        results: one for each row.
        ranks: how many processes torchrun started.
    """
    start = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
    chosen = [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
    script = f"benchmarks/{benchmark}.py"
    command = shlex.join([*chosen, *start, script, *_without_output(sys.argv[1:])])
    return make_record(benchmark, command, " ".join(method.split()), results)


def _without_output(arguments: list[str]) -> list[str]:
    """A command's arguments without --output and --overwrite, which change no result."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-o", "--output")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_known_args(arguments)[1]


def column(name: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A table's column: a number of each result in a format, empty where a result has none."""
    return lambda result: format(result[name], form) if name in result else ""


KERNEL_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "op": lambda row: row["op"],
    "shape": lambda row: "×".join(map(str, row["shape"])),
    "median ms": column("median_ms", ".4f"),
    "p90 ms": column("p90_ms", ".4f"),
    "GB/s": column("gb_s", ".0f"),
}
"""The first columns of a table of kernels."""
