"""What a command reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lltk.graph.recipe import Recipe, parse_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.models.hub import on_disk

if TYPE_CHECKING:
    import torch

    from lltk.streaming import BundlePlan, Plan

_NAMED = (
    ("model", "checkpoint"),
    ("model", "lora"),
    ("stream", "pipeline"),
    ("train", "data", "pipeline"),
    ("train", "data", "folder"),
    ("train", "data", "prepared"),
    ("distil", "real", "weights"),
    ("distil", "fake", "weights"),
)
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Source:
    """What a command streams: a recipe, or a bundle.

    Attributes:
        path: the recipe's file, or the bundle's folder.
        recipe: of either.
        bundle: the bundle's plan; None where it is a recipe.
    """

    path: Path
    recipe: Recipe
    bundle: BundlePlan | None

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        return inputs_of(self.path, self.recipe.resolved())

    def plan(self, device: torch.device, weights: bool) -> Plan:
        """The plan of its stream; a recipe's is for a device, with or without weights.

        Raises:
            ValueError: as by `plan_stream`.
        """
        from lltk.streaming import plan_stream

        if self.bundle is not None:
            return self.bundle
        return plan_stream(self.recipe, device, weights=weights, where=str(self.path))


def find_source(
    name: str,
    overrides: Sequence[str],
    download: bool,
    needed: bool,
    provider: str | None = None,
    device: str | None = None,
) -> Source:
    """The recipe or the bundle of a name.

    Args:
        name: of a recipe, or the path of a bundle.
        overrides: keys to change.
        download, needed: as for `on_disk`.
        provider: for a bundle, ONNX Runtime's execution provider; None for the CPU's.
        device: for a recipe, where it runs.

    Raises:
        ValueError: as by `load_recipe`, `on_disk` and `plan_bundle`; or an option is for the other.
    """
    from lltk.stream.runtimes.onnx_graph import CUDA
    from lltk.streaming import is_bundle, plan_bundle

    if not is_bundle(name):
        if provider is not None:
            raise ValueError(f"--provider: is for a bundle, and {name} is none; use --device")
        path = find_recipe(name)
        return Source(path, located(path, overrides, download, needed), None)
    if device is not None:
        raise ValueError(f"--device: {name} is a bundle; use --provider, such as {CUDA}")
    plan = plan_bundle(Path(name), overrides, provider, download=download)
    return Source(plan.path, plan.recipe, plan)


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
