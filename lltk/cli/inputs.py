"""What a command reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lltk.graph.recipe import Recipe, parse_recipe, read_recipe
from lltk.models.hub import on_disk

_NAMED = (
    ("model", "checkpoint"),
    ("model", "lora"),
    ("stream", "pipeline"),
    ("train", "data", "pipeline"),
    ("train", "data", "folder"),
)
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")


def located(path: Path, overrides: Sequence[str], download: bool, needed: bool) -> Recipe:
    """A recipe, in which paths stand for what it names on the Hugging Face hub.

    Args:
        path, overrides: as for `load_recipe`.
        download, needed: as for `on_disk`.

    Raises:
        ValueError: as by `load_recipe` and `on_disk`.
    """
    return parse_recipe(on_disk(read_recipe(path, overrides), download, needed), str(path))


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


def adapter_keys(adapters: Sequence[str]) -> list[str]:
    """The recipe's keys for adapters that are given as FILE or FILE:STRENGTH.

    Raises:
        ValueError: a strength is not finite.
    """
    files, strengths = [], []
    for adapter in adapters:
        file, strength = adapter, 1.0
        before, colon, after = adapter.rpartition(":")
        if colon and not Path(adapter).exists():
            with suppress(ValueError):
                strength = float(after)
                file = before
        if not math.isfinite(strength):
            raise ValueError(f"--lora: {adapter}: {after} is no strength; write a number")
        files.append(file)
        strengths.append(strength)
    if not files:
        return []
    return [f"model.lora={json.dumps(files)}", f"model.lora_strength={json.dumps(strengths)}"]
