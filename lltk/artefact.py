"""Program directories: a Program's recipe, pass log, weights and printed graphs.

The printed graphs are not run. Loading repeats the recipe's passes, and compares the digests of the
graphs that they give with those of the printed ones. So nothing in the directory is executed.
"""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file

from lltk import __version__
from lltk.compiler import transform, with_weights
from lltk.files.manifest import Manifest
from lltk.files.outputs import Kind, Output, check_outputs
from lltk.files.tensors import write_tensors
from lltk.files.writing import standing, whole_folder
from lltk.graph.packed import check_fp8_weights, packed_weights
from lltk.graph.program import LogEntry, Program
from lltk.graph.recipe import parse_recipe, validated
from lltk.graph.stages import Stage
from lltk.graph.text import print_graph

MANIFEST = Manifest(
    "program.json", "a Program", format=4, remedy="restore it, or transform the recipe again"
)
PROGRAM = Kind("a Program", MANIFEST.recognises, folder=True)
WEIGHTS = "weights.safetensors"


class _Entry(BaseModel):
    """A `LogEntry`, as the manifest has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: int
    config: dict[str, Any]
    stage: str
    numerics: str
    matches: dict[str, int]
    kept: dict[str, list[str]]
    ops_before: int
    ops_after: int
    seconds: float


class _Facts(BaseModel):
    """What the manifest says besides the checksums of the files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: dict[str, str]
    stage: str
    recipe: dict[str, Any]
    log: list[_Entry]
    files: dict[str, str]


def save_program(program: Program, directory: Path, overwrite: bool = False) -> None:
    """Write a Program directory, whole or not at all.

    Args:
        program: with or without weights.
        directory: a new or empty folder, or a Program directory, which is replaced.
        overwrite: whether a folder that holds anything else may be replaced.

    Raises:
        ValueError: the folder holds something else, or a quantised weight is broken.
        OSError: the folder cannot be written.
    """
    check_outputs([Output(directory, PROGRAM)], [], overwrite)
    with whole_folder(directory) as folder:
        for name, graph in program.every_graph():
            folder.write_text(f"graphs/{name}.txt", print_graph(graph, name))
        if not any(tensor.is_meta for tensor in program.weights.values()):
            packed_weights(program.weights, "weights")  # refuses broken scales
            check_fp8_weights(program.weights, "weights")
            with folder.file(WEIGHTS) as file:
                write_tensors(file, program.weights, {"format": "pt"})
        facts = {
            "versions": versions(),
            "stage": str(program.stage),
            "recipe": program.recipe,
            "log": [entry.plain() for entry in program.log],
        }
        MANIFEST.write(folder, facts)


def load_program(directory: Path) -> Program:
    """Read a Program directory.

    Raises:
        ValueError: it is no such directory, a file was changed or is missing, the format is
            another, or the passes give other graphs than when it was written, as they may with
            other versions of torch and diffusers.
    """
    directory = standing(directory)
    where = str(directory / MANIFEST.name)
    facts = validated(_Facts, MANIFEST.read(directory), where)
    recipe = parse_recipe(facts.recipe, where)
    try:
        program = transform(recipe, weights=False)
    except ValueError as error:
        raise ValueError(f"{where}: its recipe: {error}") from error
    for name, graph in program.every_graph():
        printed = print_graph(graph, name).encode()
        if facts.files.get(f"graphs/{name}.txt") != hashlib.sha256(printed).hexdigest():
            made = ", ".join(f"{key} {value}" for key, value in facts.versions.items())
            raise ValueError(
                f"{directory}: the passes of this installation give another graph {name!r}; it "
                f"was made with {made}; install those, or transform the recipe again"
            )
    program.log = [_log_entry(entry, where) for entry in facts.log]
    if WEIGHTS not in facts.files:
        return program
    try:
        weights = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS}: damaged ({error}); transform again") from error
    return with_weights(program, weights, str(directory / WEIGHTS))


def _log_entry(entry: _Entry, where: str) -> LogEntry:
    """An entry of the pass log, from the manifest."""
    known = {str(stage): stage for stage in Stage}
    if entry.stage not in known:
        raise ValueError(f"{where}: {entry.stage!r} is no stage; {MANIFEST.remedy}")
    return LogEntry(**{**entry.model_dump(), "stage": known[entry.stage]})


def versions() -> dict[str, str]:
    """The versions that a result depends on, by package."""
    packages = ("torch", "diffusers", "transformers", "safetensors")
    return {
        "python": platform.python_version(),
        "lltk": __version__,
        **{name: version(name) for name in packages},
    }
