"""Program directories: a Program's recipe, pass log, weights and printed graphs.

The printed graphs are not run. Loading repeats the recipe's passes, and compares the digests of the
graphs that they give with those of the printed ones. So nothing in the directory is executed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lltk import __version__
from lltk.compiler import transform, with_weights
from lltk.graph.files import written_whole
from lltk.graph.packed import check_fp8_weights, packed_weights
from lltk.graph.program import LogEntry, Program
from lltk.graph.recipe import parse_recipe
from lltk.graph.stages import Stage
from lltk.graph.text import print_graph

FORMAT = 3
MANIFEST = "program.json"
WEIGHTS = "weights.safetensors"


def save_program(program: Program, directory: Path) -> None:
    """Write a Program directory, whole or not at all.

    Args:
        program: with or without weights.
        directory: a new or empty folder, or a Program directory, which is replaced.

    Raises:
        ValueError: the folder holds something else, or a quantised weight is broken.
    """
    check_target(directory)
    with written_whole(directory) as folder:
        folder.mkdir()
        graphs = folder / "graphs"
        graphs.mkdir()
        for name, graph in program.every_graph():
            (graphs / f"{name}.txt").write_text(print_graph(graph, name), encoding="utf-8")
        if not any(tensor.is_meta for tensor in program.weights.values()):
            packed_weights(program.weights, "weights")  # refuses broken scales
            check_fp8_weights(program.weights, "weights")
            contiguous = {name: tensor.contiguous() for name, tensor in program.weights.items()}
            save_file(contiguous, folder / WEIGHTS, {"format": "pt"})
        manifest = {
            "format": FORMAT,
            "versions": versions(),
            "stage": str(program.stage),
            "recipe": program.recipe,
            "log": [entry.plain() for entry in program.log],
            "files": {
                str(file.relative_to(folder)): _digest(file)
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            },
        }
        manifest["digest"] = _digest_of(manifest)
        text = json.dumps(manifest, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def check_target(directory: Path) -> None:
    """Check that a Program may be written to a path.

    Raises:
        ValueError: there is something other than an empty folder or a Program.
    """
    if directory.is_file():
        raise ValueError(f"{directory}: is a file; name a folder")
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).exists():
        raise ValueError(f"{directory}: holds other files; name a new or an empty folder")


def load_program(directory: Path) -> Program:
    """Read a Program directory.

    Raises:
        ValueError: it is no such directory, a file was changed or is missing, the format is
            another, or the passes give other graphs than when it was written, as they may with
            other versions of torch and diffusers.
    """
    manifest = read_manifest(directory)
    program = transform(parse_recipe(manifest["recipe"], str(directory / MANIFEST)), weights=False)
    for name, graph in program.every_graph():
        printed = print_graph(graph, name).encode()
        if manifest["files"].get(f"graphs/{name}.txt") != hashlib.sha256(printed).hexdigest():
            made = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())
            raise ValueError(
                f"{directory}: the passes of this installation give another graph {name!r}; it "
                f"was made with {made}; install those, or transform the recipe again"
            )
    program.log = [read_log_entry(entry) for entry in manifest["log"]]
    if WEIGHTS not in manifest["files"]:
        return program
    try:
        weights = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS}: damaged ({error}); transform again") from error
    return with_weights(program, weights)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a Program directory; checks every file against it.

    Raises:
        ValueError: it is no such directory, a file was changed or is missing, or the format is
            another.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory}: has no {MANIFEST}; name a folder that lltk transform wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        made_format, files = manifest["format"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is damaged ({error}); transform the recipe again") from error
    if made_format != FORMAT:
        raise ValueError(
            f"{path}: is of format {made_format}, this lltk reads {FORMAT}; transform again, or "
            f"use lltk {manifest.get('versions', {}).get('lltk', 'of its version')}"
        )
    changed = "was changed after it was written; restore it, or transform the recipe again"
    if manifest.pop("digest", None) != _digest_of(manifest):
        raise ValueError(f"{path}: {changed}")
    for name, digest in files.items():
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{file}: is missing; restore it, or transform the recipe again")
        if _digest(file) != digest:
            raise ValueError(f"{file}: {changed}")
    return dict(manifest)


def read_log_entry(data: dict[str, Any]) -> LogEntry:
    """An entry of the pass log, from the manifest."""
    return LogEntry(**{**data, "stage": Stage[data["stage"].upper()]})


def versions() -> dict[str, str]:
    """The versions that a result depends on, by package."""
    packages = ("torch", "diffusers", "transformers", "safetensors")
    return {
        "python": platform.python_version(),
        "lltk": __version__,
        **{name: version(name) for name in packages},
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
