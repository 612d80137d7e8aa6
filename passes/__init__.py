"""One pass a file; a recipe names a pass by its file."""

from __future__ import annotations

if __name__ != "lltk.passes":
    raise ImportError(f"import lltk.passes, not {__name__}")

import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import isabstract
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from lltk.graph.passes import Pass, PassConfig
from lltk.graph.recipe import explain
from lltk.module_paths import import_by_path

RENAMED = {
    "fuse_gated_residual": "fuse_rows",
    "fuse_gelu_quantise": "fuse_rows",
    "fuse_norm_quantise": "fuse_rows",
}
"""Passes that older recipes name, and the pass that does what each of them did."""


def pass_names() -> list[str]:
    """The names of lltk's own passes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def make_pass(name: str, options: Mapping[str, Any]) -> Pass[Any]:
    """The pass of that name, configured.

    Args:
        name: a file of this folder, such as ``lora``. For a pass from elsewhere it is the path of
            its module, which has a dot, such as ``my_passes.lora``.
        options: fields of the pass's configuration.

    Raises:
        ValueError: there is no such pass, its module cannot be imported or does not define exactly
            one pass, or the pass has no such option. Names the file, or the nearest name.
    """
    if name.startswith("lltk."):
        raise ValueError(f"passes: {name}: lltk's own passes go by their last name alone")
    if name in RENAMED:
        raise ValueError(f"there is no pass {name!r} any more; name {RENAMED[name]} once instead")
    if "." not in name and name not in pass_names():
        near = get_close_matches(name, pass_names(), n=1)
        known = f"passes: {', '.join(pass_names())}, or your own by its path, my_passes.{name}"
        hint = f"did you mean {near[0]!r}?" if near else known
        raise ValueError(f"there is no pass {name!r}; {hint}")
    kind = _only_pass(import_by_path(name if "." in name else f"{__name__}.{name}"))
    config: type[PassConfig] = kind.Config
    try:
        return kind(config.model_validate(dict(options)))
    except ValidationError as error:
        raise ValueError(f"passes: {name}: {explain(error, config)}") from error


def _only_pass(module: ModuleType) -> type[Pass[Any]]:
    """The class of the pass that a module defines; ValueError unless it is one and complete."""
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Pass)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise ValueError(f"{module.__file__}: must define one subclass of Pass, it defines {names}")
    (kind,) = found
    lacking = [name for name in ("Config", "reads", "numerics") if not hasattr(kind, name)]
    if lacking or isabstract(kind):
        raise ValueError(
            f"{module.__file__}: {kind.__name__} lacks {', '.join(lacking or ['apply'])}"
        )
    return kind
