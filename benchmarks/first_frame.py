"""Time the 5B's first frame: with no compiled kernels, with those of an earlier process, and again.

python benchmarks/first_frame.py
python benchmarks/first_frame.py --device cpu --recipe tiny_stream
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lltk.bench.record import Record, markdown, record_files, write_record
from lltk.bench.script import column, script_options, script_parser, script_record

_METHOD = """\
Seconds from the beginning of a session's first chunk, with models loaded and prompts encoded, until
its first frame is in the file. Two processes of benchmarks/inference.py stream one after the other,
each some sessions. The folders in which Triton, torch and CUDA keep compiled kernels are empty when
the first process begins; the second has them as the first one left them. In a running process, a
session of the same models came before."""
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
_SESSIONS = ("+ FP8 decoder", "+ async decoding", "2 steps")
"""Rows of benchmarks/inference.py that share their models, in its order."""
ROWS: Mapping[str, tuple[int, str]] = {
    "caches emptied": (0, "+ FP8 decoder"),
    "caches of an earlier process": (1, "+ FP8 decoder"),
    "in a running process": (1, "+ async decoding"),
    "in a running process, 2 steps": (1, "2 steps"),
}
"""The process of each row, and the session in it."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument("--recipe", help="in place of the 5B's")
    return made


def main() -> None:
    """Measure, and write the record."""
    options = script_options(parser())
    with TemporaryDirectory() as folder:
        processes = [_sessions(options, Path(folder), number) for number in range(2)]
    results = [
        {**processes[number][session], "name": name} for name, (number, session) in ROWS.items()
    ]
    record = script_record("first_frame", _METHOD, results)
    write_record(options.output, record, text(record))
    print(text(record))


def _sessions(options: argparse.Namespace, folder: Path, number: int) -> dict[str, dict[str, Any]]:
    """What a process's sessions took, by their names."""
    made = folder / f"process {number}"
    words = [str(Path(__file__).with_name("inference.py")), "--device", options.device]
    words += [word for name in _SESSIONS for word in ("--only", name)]
    words += ["--seconds", "2", "--warmup", "1", "-o", str(made)]
    words += ["--recipe", options.recipe] if options.recipe else []
    caches = {name: str(folder / name) for name in _CACHES}
    subprocess.run([sys.executable, *words], env=os.environ | caches, check=True)
    results = Record.model_validate_json(record_files(made)[0].read_text()).results
    return {row["name"]: row for row in results}


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "": lambda row: row["name"],
        "steps": lambda row: str(row["steps"]),
        "first frame s": column("first_frame_seconds", ".2f"),
        "ran": lambda row: row["ran"]["transformer"] + "; decoder " + row["ran"]["decoder"],
    }
    return markdown(record, "The first frame", columns)


if __name__ == "__main__":
    main()
