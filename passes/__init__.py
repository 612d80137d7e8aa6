"""One pass a file; a recipe names a pass by its file."""

from __future__ import annotations

if __name__ != "lltk.passes":
    raise ImportError(f"import lltk.passes, not {__name__}")

import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from lltk.graph.passes import Pass, PassConfig
from lltk.graph.recipe import explain


def pass_names() -> list[str]:
    """Every pass there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def make_pass(name: str, options: Mapping[str, Any]) -> Pass[Any]:
    """The pass in the file ``name``, configured.

    Raises:
        ValueError: no such pass, or options it does not have; names the nearest.
    """
    if name not in pass_names():
        near = get_close_matches(name, pass_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"passes: {', '.join(pass_names())}"
        raise ValueError(f"there is no pass {name!r}; {hint}")
    module = import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Pass)
        and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} holds {len(found)} passes, not one"
    (kind,) = found
    config: type[PassConfig] = kind.Config
    try:
        return kind(config.model_validate(dict(options)))
    except ValidationError as error:
        raise ValueError(f"passes: {name}: {explain(error, config)}") from error
