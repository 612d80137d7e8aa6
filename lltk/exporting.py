"""From a stream recipe to a bundle.

::

    plan = plan_export(open_recipe("tiny_stream"))
    export(plan, Path("bundle"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lltk.compiler import transform
from lltk.export.bundle import Difference, emit, write_bundle
from lltk.export.golden import decoder_cases, transformer_cases
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe
from lltk.models.pipelines import find_pipeline
from lltk.stream.recipe import stream_section
from lltk.stream.sampler import Schedule
from lltk.stream.text import encoder_digest
from lltk.streaming import plan_stream


@dataclass(frozen=True)
class ExportPlan:
    """The Programs of a bundle, before anything is written.

    Attributes:
        recipe: what they are made from.
        reference: the transformer's Program, whose results the bundle must give.
        transformer: the same, with graphs that mutate nothing.
        decoder: the decoder's Program.
    """

    recipe: Recipe
    reference: Program
    transformer: Program
    decoder: Program

    @property
    def stages(self) -> dict[str, Program]:
        """The Programs whose graphs the bundle holds, by name."""
        return {"transformer": self.transformer, "decoder": self.decoder}


def plan_export(recipe: Recipe, *, weights: bool = True) -> ExportPlan:
    """Make the Programs of a bundle.

    The recipe's pass lower is left out, and so are the decoder's passes: the kernels that they
    choose are torch's.

    Args:
        recipe: of a stream.
        weights: whether to map the weights. A plan without weights can only be looked at.

    Raises:
        ValueError: the recipe, its checkpoint or its pipeline does not fit, or is of a kind that
            this version does not export.
    """
    _check(recipe)
    plain = [entry for entry in recipe.passes if _name(entry) != "lower"]
    decoder = (recipe.stream or {}).get("decoder") or {}
    stream = {**(recipe.stream or {}), "decoder": {**decoder, "passes": ["canonicalise"]}}
    external = recipe.model_copy(update={"passes": _externalised(plain), "stream": stream})
    plan = plan_stream(external, weights=weights)
    reference = transform(plan.recipe.model_copy(update={"passes": plain}), weights=weights)
    return ExportPlan(recipe, reference, plan.transformer, plan.decoders[0].program)


def export(
    plan: ExportPlan,
    path: Path,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda what: None,
) -> list[Difference]:
    """Write a bundle; arguments, result and errors as `write_bundle`'s."""
    program = plan.transformer
    recipe = plan.recipe.resolved()
    recipe["model"]["config"] = program.recipe["model"]["config"]  # whole, not by a name
    section = stream_section(plan.recipe.stream, "recipe")
    rows, columns = program.geometry.grid(program.spec)
    cases = chain(transformer_cases(plan.reference, program), decoder_cases(plan.decoder))
    return write_bundle(
        path,
        plan.stages,
        cases,
        recipe,
        {
            "rows": rows,
            "columns": columns,
            "split": list(program.spec.rope_split),
            "theta": program.spec.rope_theta,
        },
        Schedule.make(section.steps, section.shift).table.tolist(),
        encoder_digest(find_pipeline(section.pipeline)),
        overwrite,
        note,
    )


def emitted(plan: ExportPlan) -> dict[str, int]:
    """How many nodes each graph of a bundle has; needs no weights.

    Raises:
        ValueError: an op has no form in ONNX.
    """
    return {
        f"{stage}/{name}": len(model.graph.node)
        for stage, program in plan.stages.items()
        for name, model in emit(program)[1].items()
    }


def _check(recipe: Recipe) -> None:
    """Refuse what this version does not export."""
    if recipe.program != "stream":
        raise ValueError(f"program: {recipe.program} has no bundle; name a stream recipe")
    if recipe.model.dtype != "float32":
        raise ValueError(
            f"model.dtype: is {recipe.model.dtype}, and this version exports float32 alone; set "
            "model.dtype=float32"
        )
    if recipe.geometry.batch != 1:
        raise ValueError(
            f"geometry.batch: is {recipe.geometry.batch}, and a bundle makes one video at a time; "
            "set geometry.batch=1"
        )
    decoder = stream_section(recipe.stream, "recipe").decoder
    if decoder.dtype != "float32":
        raise ValueError(
            f"stream.decoder.dtype: is {decoder.dtype}, and this version exports float32 alone; "
            "set stream.decoder.dtype=float32"
        )
    if isinstance(decoder.device, tuple) and len(decoder.device) > 1:
        raise ValueError(
            "stream.decoder.device: names several, and a bundle holds one decoder; name one"
        )


def _externalised(passes: Sequence[Any]) -> list[Any]:
    """The passes with externalise before regionalise."""
    names = list(map(_name, passes))
    place = names.index("regionalise") if "regionalise" in names else len(names)
    return [*passes[:place], "externalise", *passes[place:]]


def _name(entry: str | dict[str, Any]) -> str:
    """The name of a pass in a recipe."""
    return entry if isinstance(entry, str) else next(iter(entry))
