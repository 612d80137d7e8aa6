"""Modules that a recipe names by their path, such as ``my_passes.dim``."""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def find_by_path(path: str) -> ModuleSpec:
    """Where a module lies. The packages around it are imported, it itself is not.

    Args:
        path: names joined by dots; ``my_passes.dim`` is the file ``my_passes/dim.py`` in a folder
            where Python looks for modules.

    Raises:
        ValueError: there is no such module, or a package around it cannot be imported.
    """
    package, _, name = path.rpartition(".")
    if package:
        import_by_path(package)
    try:
        spec = find_spec(path) if name.isidentifier() else None
    except ImportError:  # what it should lie in is no package, or is not named
        spec = None
    if spec is None:
        raise ValueError(
            f"Python finds no module {path!r}; run `python -m lltk` in the folder that holds it, "
            "or add that folder to PYTHONPATH"
        )
    return spec


def import_by_path(path: str) -> ModuleType:
    """Import a module as an ``import`` statement would.

    Args:
        path: as `find_by_path`'s.

    Raises:
        ValueError: as `find_by_path`'s, or the module's own code fails. Names the file.
    """
    spec = find_by_path(path)
    try:
        return import_module(path)
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{spec.origin}: cannot be imported ({reason})") from error
