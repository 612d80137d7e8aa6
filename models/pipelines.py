"""Pipelines: folders in diffusers' layout that hold all parts of a model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_SHIPPED = {"tiny": "tiny/pipeline"}


def find_pipeline(name: str, needed: bool = True) -> Path:
    """The folder of a pipeline given by path or, if shipped, by name.

    Args:
        name: a path, or the name of a shipped pipeline.
        needed: whether the folder must exist.

    Raises:
        ValueError: the folder does not exist, and it is needed or is a shipped one.
    """
    path = Path(name)
    if path.is_dir() or (name not in _SHIPPED and not needed):
        return path
    if name not in _SHIPPED:
        raise ValueError(
            f"{name}: no such pipeline folder; name one in diffusers' layout, as with "
            f"--set stream.pipeline=FOLDER, or a shipped one: {', '.join(_SHIPPED)}"
        )
    shipped = Path(str(files("lltk.models"))) / _SHIPPED[name]
    if not shipped.is_dir():
        raise ValueError(f"{name}: {shipped} is not in this installation; install lltk again")
    return shipped
