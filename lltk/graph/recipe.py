"""Recipes: YAML or JSON files that say which model, at which sizes, through which passes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lltk.files.reading import check_plain, check_regular, parse_yaml, read_plain
from lltk.graph.geometry import Geometry
from lltk.graph.recipe_files import find_recipe

_LONGEST_CHAIN = 16
"""Recipes that extend one another."""
Checked = TypeVar("Checked", bound=BaseModel)


class ModelSection(BaseModel):
    """Which model, with which weights, and how it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str | dict[str, Any] | None = Field(
        None, description="a named configuration, or the arguments of the model's class"
    )
    checkpoint: str | None = Field(None, description="weights: a directory or file")
    ema: bool = Field(False, description="take the averaged weights of a LongLive file")
    latents: int = Field(
        1,
        ge=1,
        description="latents that a call of a decoder takes, or of an encoder makes, at most",
    )
    columns: tuple[int, int] | None = Field(
        None,
        description="columns of latents that a decoder decodes: the first, and the one after the "
        "last; null for all",
    )
    lora: str | tuple[str, ...] | None = Field(
        None, description="adapters to merge into the weights: files or folders"
    )
    lora_strength: float | tuple[float, ...] = Field(
        1.0, description="what the adapters add is multiplied by: a number, or one an adapter"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="compute dtype; stored weights keep theirs"
    )

    def adapters(self) -> list[tuple[str, float]]:
        """The adapters to merge, each with its strength.

        Raises:
            ValueError: there is not a strength for each.
        """
        files = (self.lora,) if isinstance(self.lora, str) else self.lora or ()
        given = self.lora_strength
        strengths = given if isinstance(given, tuple) else (given,) * len(files)
        if len(strengths) != len(files) or (given != 1 and not files):
            raise ValueError(
                f"model.lora_strength: {given} for {len(files)} adapters in model.lora; give one "
                "number, or one an adapter"
            )
        return list(zip(files, strengths, strict=True))


class Recipe(BaseModel):
    """A resolved recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    program: Literal["train", "score", "stream", "reference", "decode", "encode"] = Field(
        description="train, score, stream, reference, decode or encode"
    )
    model: ModelSection
    geometry: Geometry
    passes: list[str | dict[str, dict[str, Any] | None]] = Field(
        description="pass names in order, or {name: {option: value}}; a pass of your own goes by "
        "the path of its module, such as my_passes.dim"
    )
    train: dict[str, Any] | None = Field(
        None, description="how it is trained; checked by lltk.train.recipe when it is"
    )
    stream: dict[str, Any] | None = Field(
        None, description="how it is streamed; checked by lltk.stream.recipe when it is"
    )
    distil: dict[str, Any] | None = Field(
        None,
        description="how it is distilled; checked by lltk.train.distil_section when it is",
    )

    @field_validator("passes")
    @classmethod
    def _one_pass_an_entry(cls, entries: list[Any]) -> list[Any]:
        for entry in entries:
            if isinstance(entry, dict) and len(entry) != 1:
                raise ValueError(f"write one pass an entry, not {sorted(entry)}")
        return entries

    def steps(self) -> list[tuple[str, dict[str, Any]]]:
        """(pass name, options) in order."""
        steps = []
        for entry in self.passes:
            name, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
            steps.append((name, options or {}))
        return steps

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data."""
        return self.model_dump(mode="json")


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and overrides.

    Args:
        path: YAML file. Its ``extends`` names a file relative to it, or a shipped recipe.
        overrides: each ``key.path=value`` with a YAML value, or ``passes.NAME.option=value``.

    Raises:
        ValueError: the file cannot be read, or a key is unknown or has a value that does not fit;
            names the key, and the nearest known one.
    """
    return parse_recipe(read_recipe(path, overrides), str(path))


def open_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a file, or a shipped recipe by name.

    Args:
        name: of either.
        overrides: as in `load_recipe`.

    Raises:
        ValueError: there is none, or as `load_recipe`.
    """
    return load_recipe(find_recipe(name), overrides)


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The plain data of a recipe of any kind, not yet checked; arguments as for `load_recipe`.

    Raises:
        ValueError: the file cannot be read, or an override does not fit.
    """
    return overridden(_read(path, ()), overrides)


def overridden(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The plain data of a recipe with overrides; arguments and errors as for `read_recipe`."""
    made = deepcopy(dict(data))
    for override in overrides:
        _override(made, override)
    return made


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """The recipe in plain data; ``where`` is what errors call it."""
    return validated(Recipe, data, where)


def validated(model: type[Checked], data: Any, where: str) -> Checked:
    """Plain data as a pydantic model. Types are held to strictly: a flag or a text is no number.

    Args:
        model: what it should be.
        data: what JSON can hold.
        where: what errors call it.

    Raises:
        ValueError: it does not fit; names each key, and for an unknown one the nearest known.
    """
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: is no plain data: {error}") from error
    check_plain(json.loads(text), where)
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error, model)}") from error


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in (other.resolve() for other in seen):
        raise ValueError(f"{path}: extends itself through {' → '.join(p.name for p in seen)}")
    if len(seen) == _LONGEST_CHAIN:
        raise ValueError(f"{seen[0]}: extends more than {_LONGEST_CHAIN} recipes in a row")
    data = read_plain(path)
    shots = data if isinstance(data, list) else []
    if shots and all(isinstance(shot, dict) and "caption" in shot for shot in shots):
        raise ValueError(
            f"{path}: is a shot script, not a recipe; name a recipe first, such as tiny_stream, "
            f"and give the script as --script {path}"
        )
    if not isinstance(data, dict):
        raise ValueError(f"{path}: is not a mapping of recipe keys")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends: {parent!r} is not the path of a recipe")
    try:
        extended = find_recipe(parent, path.parent)
        check_regular(extended)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: extends: {error}") from error
    return _merge(_read(extended, (*seen, path)), data)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both and old is not None else value
    return merged


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--set {override}: write key.path=value")
    *parents, leaf = path.strip().split(".")
    if parents[:1] == ["passes"] and isinstance(data.get("passes"), list):
        if len(parents) < 2:
            raise ValueError(f"--set {override}: write passes.NAME.OPTION=VALUE")
        data, parents = _options(data["passes"], ".".join(parents[1:]), override), []
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ValueError(f"--set {override}: {parent} holds a value, not keys")
    data[leaf] = parse_yaml(text, f"--set {override}", prose=True)


def _options(passes: list[Any], name: str, override: str) -> dict[str, Any]:
    """The options of a pass in a recipe's list; to change them changes the list."""
    names = [str(next(iter(e), "")) if isinstance(e, dict) else str(e) for e in passes]
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"passes: {', '.join(names)}"
        raise ValueError(f"--set {override}: the recipe has no pass {name!r}; {hint}")
    at = names.index(name)
    entry = passes[at]
    options = dict((entry[name] if isinstance(entry, dict) else None) or {})
    passes[at] = {name: options}
    return options


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A pydantic error in a line; unknown keys come with the nearest known one."""
    lines = []
    for finding in error.errors():
        path = [str(part) for part in finding["loc"]]
        if finding["type"] == "extra_forbidden":
            known = _fields_at(model, path[:-1])
            near = get_close_matches(path[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"unknown key {'.'.join(path)!r}; {hint}")
        else:
            message = finding["msg"].removeprefix("Value error, ")
            prefix = "" if finding["type"] == "value_error" else f"{'.'.join(path)}: "
            lines.append(f"{prefix}{message}")
    return "; ".join(dict.fromkeys(lines))


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        types = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        section = next((kind for kind in types if issubclass(kind, BaseModel)), None)
        if section is None:
            return list(model.model_fields)
        model = section
    return list(model.model_fields)
