"""Making a Program from a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lltk.graph.low_rank import LowRank
from lltk.graph.packed import check_fp8_weights, is_packed, packed_weights, plain_name
from lltk.graph.passes import Pass, run_passes
from lltk.graph.program import Program
from lltk.graph.recipe import ModelSection, Recipe
from lltk.graph.weights import check_weights, few
from lltk.models.adapters import Adapter, load_adapter, merge_adapters
from lltk.models.configs import named_config
from lltk.models.families import FAMILIES, family_of
from lltk.models.family import Family
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.passes import make_pass

Observer = Callable[[Program], None]
Adapters = Sequence[tuple[Adapter, float]]
"""Adapters, each with its strength."""


def transform(
    recipe: Recipe,
    *,
    weights: bool = True,
    stop_after: str | None = None,
    disable: Collection[str] = (),
    observe: Observer | None = None,
    section: str = "model",
) -> Program:
    """Capture the recipe's model and run its passes.

    The adapters of ``model.lora`` are merged into the weights; where ``lora`` is the last to run of
    ``lora`` and ``merge_lora``, its adapters go on from the file instead.

    Args:
        recipe: what to make.
        weights: whether to load ``model.checkpoint``, and adapters. If not, parameters are meta
            tensors.
        stop_after: name of the last pass to run.
        disable: names of passes to leave out.
        observe: called with the Program after capture and after each pass.
        section: what errors call the recipe's model section.

    Raises:
        ValueError: something in the recipe, its checkpoint or the order of its passes does not fit.
    """
    steps = configured_passes(recipe, stop_after, disable)
    adapters, names = _adapters(recipe, weights), [step.name for step in steps]
    learned: dict[str, Tensor] = {}
    if "lora" in names:
        options = dict(recipe.steps())["lora"]
        for adapter, _ in adapters:
            _check_lora(adapter, options)
        if adapters and "merge_lora" not in names:
            steps[names.index("lora")], learned = _lora_from(adapters, options)
            adapters = []
    program, packed = _capture(recipe, adapters, weights, section)
    if learned and packed is not None:
        raise ValueError(
            f"model.lora: lora goes on from an adapter over plain weights, and "
            f"{recipe.model.checkpoint} is in NVFP4; add merge_lora, or drop lora, to merge it"
        )
    program.weights |= learned
    program.recipe["passes"] = [{s.name: s.config.model_dump(mode="json")} for s in steps]
    if observe is not None:
        observe(program)
    made = run_passes(program, steps, observe)
    return made if packed is None else with_weights(made, packed)


def fitting(recipe: Recipe) -> Observer:
    """Refuses adapters that do not fit the model that was captured.

    It is for transforming without weights, which does not need the adapters.

    Args:
        recipe: names them.

    Raises:
        ValueError: an adapter cannot be read.
    """
    adapters = _adapters(recipe, weights=True)

    def check(program: Program) -> None:
        if not program.log:
            shapes = {name: tuple(tensor.shape) for name, tensor in program.weights.items()}
            for adapter, _ in adapters:
                adapter.check(shapes)

    return check


def capture(recipe: Recipe, *, weights: bool = True, section: str = "model") -> Program:
    """Capture the recipe's model and run no pass; arguments and errors as for `transform`."""
    return _capture(recipe, _adapters(recipe, weights), weights, section)[0]


def _capture(
    recipe: Recipe, adapters: Adapters, weights: bool, section: str
) -> tuple[Program, dict[str, Tensor] | None]:
    """The captured model, with its weights, and adapters merged into them.

    Packed weights fit only after the passes, so they are given apart; None where there are none.
    """
    family = family_of(recipe.program)
    _check_options(family, recipe, section)
    config, loaded = _model(family, recipe, weights, section)
    program = family.capture(config, recipe)
    packed = None
    if loaded is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in program.weights.items()}
        for adapter, _ in adapters:
            adapter.check(shapes)
        acting = [(adapter, strength) for adapter, strength in adapters if strength]
        changed = {name for adapter, _ in acting for name in adapter.changes}
        loaded = _decoded(loaded, program, recipe, changed)
        whole = {name: tensor for name, tensor in loaded.items() if plain_name(name) == name}
        in_nvfp4 = {plain_name(name) for name in loaded.keys() - whole.keys()}
        expected = {name: shapes[name] for name in shapes if name not in in_nvfp4}
        check_weights(whole, expected, str(recipe.model.checkpoint))
        merged = merge_adapters(loaded, acting)
        if in_nvfp4:
            packed = merged
        else:
            program.weights = merged
    program.recipe = recipe.resolved()
    program.recipe["model"]["config"] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }
    return program, packed


def _check_options(family: Family, recipe: Recipe, section: str) -> None:
    """Refuse what is for models of other families."""
    for other in FAMILIES:
        for key in sorted(other.options - family.options):
            value = getattr(recipe.model, key)
            if value != ModelSection.model_fields[key].default:
                raise ValueError(
                    f"{section}.{key}: {value} is for a {other.name}, and a {recipe.program} "
                    f"program holds a {family.name}; remove it"
                )


def _decoded(
    weights: Mapping[str, Tensor], program: Program, recipe: Recipe, changed: Collection[str]
) -> dict[str, Tensor]:
    """The weights; those in NVFP4 that the passes do not take, or that change, are decoded.

    They get the dtype and width of the model's parameters.
    """
    passes = dict(recipe.steps())
    if is_packed(weights) and not {"nvfp4_infer", "fp8_infer"} & passes.keys():
        raise ValueError(
            f"model.checkpoint: {recipe.model.checkpoint} holds weights in NVFP4; add "
            "nvfp4_infer, or fp8_infer, to the recipe's passes, or name weights that are not "
            "quantised"
        )
    plain = dict(weights)
    for module, weight in packed_weights(weights, "weights").items():
        name = f"{module}.weight"
        if name not in changed and "nvfp4_infer" in passes:
            continue
        plain = {key: tensor for key, tensor in plain.items() if plain_name(key) != name}
        values, like = nvfp4_dequantise(*weight), program.weights.get(name)
        plain[name] = values if like is None else values[:, : like.shape[1]].to(like.dtype)
    return plain


def configured_passes(
    recipe: Recipe, stop_after: str | None = None, disable: Collection[str] = ()
) -> list[Pass[Any]]:
    """The recipe's passes, configured, without those that are left out; as for `transform`."""
    steps = recipe.steps()
    names = [name for name, _ in steps]
    for wanted in [*disable, *([stop_after] if stop_after else [])]:
        if wanted not in names:
            raise ValueError(f"{wanted!r} is not in the recipe's passes: {', '.join(names)}")
    if stop_after is not None:
        steps = steps[: names.index(stop_after) + 1]
    return [make_pass(name, options) for name, options in steps if name not in disable]


def with_weights(
    program: Program, weights: Mapping[str, Tensor], where: str = "weights"
) -> Program:
    """The Program with other weights.

    Args:
        program: left as it is.
        weights: a state dict of the captured model, or of the Program itself.
        where: what errors call them.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not finite, or the entries
            of a quantised weight do not fit together.
    """
    own = dict(weights)
    check_fp8_weights(own, where)
    if own.keys() != program.weights.keys():
        own = program.map_state(own)
    shapes = {name: tuple(tensor.shape) for name, tensor in program.weights.items()}
    packed_weights(own, where)
    check_weights(own, shapes, where)
    return replace(program, weights=own)


def _model(
    family: Family, recipe: Recipe, weights: bool, where: str
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The model's configuration, and its weights if they are wanted."""
    section = recipe.model
    named = section.config
    config = named_config(named, family.configs) if isinstance(named, str) else named
    config = None if config is None else family.validate(config, f"{where}.config")
    if not weights:
        if config is None:
            raise ValueError(
                f"{where}.config: name one; without weights there is no file to read it"
            )
        return config, None
    if section.checkpoint is None:
        raise ValueError(
            "model.checkpoint: the recipe names no weights; set model.checkpoint=PATH, "
            "or transform without weights (--no-weights)"
        )
    checkpoint = family.load(section)
    stated = checkpoint.config and family.validate(checkpoint.config, section.checkpoint)
    if config is None and not stated:
        raise ValueError(
            f"{where}.config: {section.checkpoint} ({checkpoint.layout}) states no configuration; "
            "name one in the recipe"
        )
    if config is not None and stated and config != stated:
        differing = sorted(key for key in config if config[key] != stated[key])
        raise ValueError(
            f"{where}.config: differs from {section.checkpoint} in {', '.join(differing)}; "
            "remove it from the recipe to take the file's"
        )
    return config or dict(stated or {}), dict(checkpoint.weights)


def _adapters(recipe: Recipe, weights: bool) -> Adapters:
    """The adapters of ``model.lora``, if weights are wanted; their number is checked anyway."""
    wanted = recipe.model.adapters()
    return [(load_adapter(file), strength) for file, strength in wanted] if weights else []


def _check_lora(adapter: Adapter, options: Mapping[str, Any]) -> None:
    """Refuse options of the lora pass that a file's adapter contradicts."""
    for module, pair in _pairs(adapter).items():
        file = {"rank": pair.rank, "alpha": pair.scale * pair.rank, "include": module}
        for key in options.keys() & file.keys():
            stated = options[key]
            same = re.fullmatch(stated or ".*", module) if key == "include" else stated == file[key]
            if not same:
                raise ValueError(
                    f"model.lora: {adapter.where} has {key} {file[key]} for {module}, and "
                    f"passes.lora.{key} is {stated}; remove that (model.lora_strength sets how "
                    "much the file acts)"
                )


def _pairs(adapter: Adapter) -> dict[str, LowRank]:
    """An adapter's low-rank changes, by module."""
    return {
        name.removesuffix(".weight"): change
        for name, change in adapter.changes.items()
        if isinstance(change, LowRank)
    }


def _lora_from(
    adapters: Adapters, options: Mapping[str, Any]
) -> tuple[Pass[Any], dict[str, Tensor]]:
    """The lora pass that goes on from an adapter, and the adapter's tensors.

    Args:
        adapters: must be one, of one rank and scale.
        options: what the recipe gives the pass. The others are the file's.
    """
    (adapter, strength), *others = adapters
    pairs = _pairs(adapter)
    kinds = sorted({(pair.rank, pair.scale) for pair in pairs.values()})
    found = [f"{adapter.where} has rank {rank} with a scale of {scale:g}" for rank, scale in kinds]
    if differences := len(adapter.changes) - len(pairs):
        found.append(f"{adapter.where} has {differences} differences")
    if others:
        found.append(f"there are {len(adapters)} adapters")
    if len(found) > 1 or not kinds:
        raise ValueError(
            f"model.lora: lora goes on from one adapter of one rank and scale; {few(found)}: add "
            "merge_lora, or drop lora, to merge"
        )
    ((rank, scale),) = kinds
    file = {"rank": rank, "alpha": scale * rank, "include": "|".join(map(re.escape, pairs))}
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{module}.lora_A.weight"] = pair.a
        tensors[f"{module}.lora_B.weight"] = pair.b * strength
    return make_pass("lora", file | dict(options)), tensors
