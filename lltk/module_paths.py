"""Modules that a recipe names by their path."""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def import_by_path(path: str) -> ModuleType:
    """Import a module, and the packages around it, as an ``import`` statement would.

    Args:
        path: names joined by dots; ``my_passes.dim`` is the file ``my_passes/dim.py`` in a folder
            where Python looks for modules.

    Raises:
        ValueError: there is no such module, or its code fails. Names the file of the latter.
    """
    names = path.split(".")
    for end in range(1, len(names) + 1):
        part = ".".join(names[:end])
        spec = _find(part)
        if spec is None:
            raise ValueError(
                f"{path}: Python finds no module {part!r}; run `python -m lltk` in the folder that "
                "holds it, or add that folder to PYTHONPATH"
            )
        try:
            module = import_module(part)
        except Exception as error:  # whatever the file's own code raises
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{spec.origin}: cannot be imported ({reason})") from error
    return module


def _find(path: str) -> ModuleSpec | None:
    """Where a module lies whose packages are imported."""
    if not path.rpartition(".")[2].isidentifier():
        return None
    try:
        return find_spec(path)
    except ModuleNotFoundError:  # what it should lie in is no package
        return None
