"""What every benchmark records beside its numbers, and how records are written.

A record is a JSON file. The Markdown file beside it is generated from the JSON. FPS means video
frames divided by seconds of wall time; each benchmark says which seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from lltk.artefact import versions
from lltk.files.outputs import Output, marked
from lltk.files.writing import write_text
from lltk.graph.memory import readable

_SOURCES = (
    *(f":/{folder}" for folder in ("lltk", "passes", "models", "recipes", "benchmarks")),
    ":(top,exclude)benchmarks/records",
)
"""Pathspecs of the files that a result depends on."""


class Hardware(BaseModel):
    """What a benchmark ran on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: str = Field(description="the processor's name")
    cores: int = Field(description="cores that the process may use")
    threads: int = Field(description="threads that torch uses for an op")
    memory: int = Field(description="bytes of main memory")
    gpus: tuple[str, ...] = Field(description="names of the GPUs that torch sees")

    def __str__(self) -> str:
        gpus = ", ".join(self.gpus) or "no GPU"
        memory = readable(self.memory)
        return f"{self.cpu}, {self.cores} cores ({self.threads} threads), {memory}, {gpus}"


class Record(BaseModel):
    """A benchmark's results and what they depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benchmark: str = Field(description="the benchmark's name")
    command: str = Field(description="the command line that made the results, with all its flags")
    method: str = Field(description="what was measured, from when to when, and what warmed up")
    hardware: Hardware
    versions: dict[str, str] = Field(description="versions of Python and of the packages used")
    commit: str = Field(description="the checkout's; unknown where there is none")
    results: list[dict[str, Any]] = Field(description="one for each row of the table")


def make_record(
    benchmark: str, command: str, method: str, results: Iterable[Mapping[str, Any]]
) -> Record:
    """A record of results that were measured on this machine, in this checkout.

    The arguments are the record's fields; the other fields are found out.
    """
    return Record(
        benchmark=benchmark,
        command=command,
        method=method,
        hardware=hardware(),
        versions=versions(),
        commit=commit(),
        results=[dict(result) for result in results],
    )


def markdown(
    record: Record, title: str, columns: Mapping[str, Callable[[Mapping[str, Any]], str]]
) -> str:
    """A record's text: a paragraph on how it was made, and a table with a row for each result.

    Args:
        record: any benchmark's.
        title: the heading.
        columns: for each column's heading, the text that it shows of a result.
    """
    made = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    rows = [[show(result) for show in columns.values()] for result in record.results]
    lines = [
        f"# {title}",
        "",
        f"{record.method} On {record.hardware}; commit {record.commit}; {made}. "
        f"Command: `{record.command}`.",
        "",
        *markdown_table(list(columns), rows),
    ]
    return "\n".join(lines) + "\n"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def write_record(path: Path, record: Record, text: str) -> None:
    """Write ``path`` + ``.json`` and ``.md``.

    Args:
        path: the files' path without a suffix.
        record: what the JSON file holds.
        text: what the Markdown file holds.
    """
    for file, content in zip(
        record_files(path), (record.model_dump_json(indent=2) + "\n", text), strict=True
    ):
        write_text(file, content)


def record_files(path: Path) -> tuple[Path, Path]:
    """The JSON and the Markdown file of a record; ``path`` is theirs without a suffix."""
    return path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.md")


def record_outputs(path: Path) -> list[Output]:
    """The same files as a command's outputs."""
    kinds = marked("a record", '"benchmark": "'), marked("a record's page", "Command: `")
    return [Output(file, kind) for file, kind in zip(record_files(path), kinds, strict=True)]


def percentile(values: Iterable[float], share: float) -> float:
    """A percentile that is one of the values: at least ``share`` of the values are no larger.

    Args:
        values: at least one.
        share: a fraction in (0, 1]; 0.9 for the 90th percentile.
    """
    ordered = sorted(values)
    return ordered[-int(-share * len(ordered) // 1) - 1]


def digest(data: Mapping[str, Any]) -> str:
    """A short name for plain data, such as a resolved recipe."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def hardware() -> Hardware:
    """What this process runs on."""
    gpus = [torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())]
    return Hardware(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=tuple(gpus),
    )


def commit() -> str:
    """The checkout's commit, with ``-dirty`` behind it where a source file differs from it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--", *_SOURCES)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
