"""Making a Program from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lltk.graph.packed import check_fp8_weights, is_packed, packed_weights, plain_name
from lltk.graph.passes import Pass, run_passes
from lltk.graph.program import Program
from lltk.graph.recipe import ModelSection, Recipe
from lltk.graph.weights import check_weights
from lltk.models.checkpoint import load_lora
from lltk.models.configs import named_config
from lltk.models.families import FAMILIES, family_of
from lltk.models.family import Family
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.passes import make_pass

Observer = Callable[[Program], None]


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

    Args:
        recipe: what to make.
        weights: whether to load ``model.checkpoint``. If not, parameters are meta tensors.
        stop_after: name of the last pass to run.
        disable: names of passes to leave out.
        observe: called with the Program after capture and after each pass.
        section: what errors call the recipe's model section.

    Raises:
        ValueError: something in the recipe, its checkpoint or the order of its passes does not fit.
    """
    steps = configured_passes(recipe, stop_after, disable)
    program, packed = _capture(recipe, weights, section)
    program.recipe["passes"] = [{s.name: s.config.model_dump(mode="json")} for s in steps]
    if observe is not None:
        observe(program)
    made = run_passes(program, steps, observe)
    return made if packed is None else with_weights(made, packed)


def capture(recipe: Recipe, *, weights: bool = True, section: str = "model") -> Program:
    """Capture the recipe's model and run no pass; arguments and errors as for `transform`."""
    return _capture(recipe, weights, section)[0]


def _capture(
    recipe: Recipe, weights: bool, section: str
) -> tuple[Program, dict[str, Tensor] | None]:
    """The captured model, with its weights.

    Packed weights fit only after the passes, so they are given apart; None where there are none.
    """
    family = family_of(recipe.program)
    _check_options(family, recipe, section)
    config, loaded = _model(family, recipe, weights, section)
    program = family.capture(config, recipe)
    packed = loaded if loaded is not None and is_packed(loaded) else None
    if packed is not None and "nvfp4_infer" not in dict(recipe.steps()):
        if "fp8_infer" not in dict(recipe.steps()):
            raise ValueError(
                f"model.checkpoint: {recipe.model.checkpoint} holds weights in NVFP4; add "
                "nvfp4_infer, or fp8_infer, to the recipe's passes"
            )
        loaded, packed = _decoded(packed, program), None
    if packed is None and loaded is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in program.weights.items()}
        check_weights(loaded, shapes, str(recipe.model.checkpoint))
        program.weights = loaded
        program.weights |= _adapters(recipe)
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


def _decoded(weights: Mapping[str, Tensor], program: Program) -> dict[str, Tensor]:
    """The weights, those in NVFP4 decoded to the dtype and width of the model's parameters."""
    plain = {name: tensor for name, tensor in weights.items() if plain_name(name) == name}
    for module, weight in packed_weights(weights, "weights").items():
        values, like = nvfp4_dequantise(*weight), program.weights.get(f"{module}.weight")
        fits = values if like is None else values[:, : like.shape[1]].to(like.dtype)
        plain[f"{module}.weight"] = fits
    return plain


def configured_passes(
    recipe: Recipe, stop_after: str | None, disable: Collection[str]
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


def with_weights(program: Program, weights: Mapping[str, Tensor]) -> Program:
    """The Program with other weights.

    Args:
        program: left as it is.
        weights: a state dict of the captured model, or of the Program itself.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not finite, or the entries
            of a quantised weight do not fit together.
    """
    own = dict(weights)
    check_fp8_weights(own, "weights")
    if own.keys() != program.weights.keys():
        own = program.map_state(own)
    shapes = {name: tuple(tensor.shape) for name, tensor in program.weights.items()}
    packed_weights(own, "weights")
    check_weights(own, shapes, "weights")
    return replace(program, weights=own)


def _model(
    family: Family, recipe: Recipe, weights: bool, where: str
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The model's configuration, and its weights if they are wanted."""
    section = recipe.model
    named = section.config
    config = named_config(named, family.configs) if isinstance(named, str) else named
    config = None if config is None else family.validate(config, f"{where}.config")
    if section.lora is not None and "lora" not in dict(recipe.steps()):
        raise ValueError("model.lora: the recipe's passes have no lora; add it, or drop the file")
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


def _adapters(recipe: Recipe) -> dict[str, Tensor]:
    """The adapters of ``model.lora``, whose scale must be that of the recipe's lora pass."""
    if recipe.model.lora is None:
        return {}
    adapter = load_lora(recipe.model.lora)
    config = make_pass("lora", dict(recipe.steps())["lora"]).config
    stated = adapter.config or {}
    alpha = stated.get("lora_alpha", config.alpha)
    if alpha != config.alpha:
        raise ValueError(
            f"model.lora: {recipe.model.lora} was trained with alpha {alpha}, the recipe's lora "
            f"pass has {config.alpha}; set lora.alpha to the file's"
        )
    return adapter.weights
