"""What a command reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMED = (
    ("model", "checkpoint"),
    ("model", "lora"),
    ("stream", "pipeline"),
    ("train", "data", "pipeline"),
    ("train", "data", "folder"),
)
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")


def inputs_of(recipe: Path, data: Mapping[str, Any]) -> list[Path]:
    """The files and folders that a recipe names, and its own.

    Args:
        recipe: its file.
        data: its plain data, not yet checked.
    """
    found = [recipe]
    for keys in _NAMED:
        value: Any = data
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        for name in value if isinstance(value, list | tuple) else [value]:
            if isinstance(name, str) and Path(name).exists():
                found += [Path(name), *(Path(name) / part for part in _PARTS)]
    return found
