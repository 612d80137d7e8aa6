"""From a stream recipe to a bundle.

::

    plan = plan_export(open_recipe("tiny_stream"))
    export(plan, Path("bundle"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from lltk.compiler import configured_passes, transform, with_weights
from lltk.export.bundle import Findings, dialect_of, emit, write_bundle
from lltk.export.engines import EngineOrder, check_formats, check_gpu
from lltk.export.facts import ORT, TENSORRT_RTX, TEXT, TOKENIZER, TextFacts
from lltk.export.golden import plain_cases, transformer_cases
from lltk.export.kernels import check_kernels, kernel_sizes
from lltk.graph.geometry import Geometry
from lltk.graph.passes import run_passes
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe
from lltk.models import umt5
from lltk.models.pipelines import find_pipeline
from lltk.passes import make_pass
from lltk.stream.recipe import stream_section
from lltk.stream.sampler import Schedule
from lltk.stream.text import encoder_digest, read_encoder
from lltk.streaming import plan_stream

_FUSIONS = ("fuse_attention_quantise", "fuse_norm_rope", "fuse_rows")
Text = Literal["bundle", "reference"]
"""Whether a bundle holds the text encoder, or says which one it needs."""


@dataclass(frozen=True)
class ExportPlan:
    """The Programs of a bundle, before anything is written.

    Attributes:
        recipe: what they are made from.
        reference: the transformer's Program, whose results the bundle must give.
        transformer: the same, with graphs that mutate nothing.
        decoder: the decoder's Program.
        text: the text encoder's, or None if the bundle does not hold it.
        folder: the pipeline's.
        engines: those to build; None for a bundle that ONNX Runtime runs.
    """

    recipe: Recipe
    reference: Program
    transformer: Program
    decoder: Program
    text: Program | None
    folder: Path
    engines: EngineOrder | None = None

    @property
    def target(self) -> str:
        """What is to run the bundle."""
        return TENSORRT_RTX if self.engines else ORT

    @property
    def stages(self) -> dict[str, Program]:
        """The Programs whose graphs the bundle holds, by name."""
        text = {} if self.text is None else {"text": self.text}
        return {"transformer": self.transformer, "decoder": self.decoder, **text}


def plan_export(
    recipe: Recipe,
    *,
    weights: bool = True,
    text: Text = "bundle",
    program: Program | None = None,
    engines: EngineOrder | None = None,
) -> ExportPlan:
    """Make the Programs of a bundle.

    The recipe's pass lower is left out, and so are the decoder's passes: the kernels that they
    choose are torch's. TensorRT fuses by itself, so engines are of graphs without lltk's fusions,
    and of one graph for steps and commits, because each engine holds the weights.

    Args:
        recipe: of a stream.
        weights: whether to map the weights. A plan without weights can only be looked at, and has
            no text encoder if its pipeline is not here.
        text: whether the bundle is to hold the text encoder.
        program: what the recipe makes, with the weights that the bundle is to have; by default
            those that the recipe names.
        engines: those to build, for TensorRT for RTX; by default the bundle is for ONNX Runtime.

    Raises:
        ValueError: the recipe, its checkpoint or its pipeline does not fit, or is of a kind that
            this version does not export; or there are no such engines.
    """
    if engines:
        check_gpu(engines.sm)
    _check(recipe, "bfloat16" if engines else "float32")
    section = stream_section(recipe.stream, "recipe")
    folder = find_pipeline(section.pipeline, needed=weights)
    held = text == "bundle" and (weights or folder.is_dir())
    if held:
        _check_text(folder)
    out = {"lower", *(_FUSIONS if engines else ())}
    plain = [entry for entry in recipe.passes if _name(entry) not in out]
    own = (recipe.stream or {}).get("decoder") or {}
    stream = {**(recipe.stream or {}), "decoder": {**own, "passes": ["canonicalise"]}}
    names = list(map(_name, plain))
    place = names.index("regionalise") if "regionalise" in names else len(names)
    before = recipe.model_copy(update={"passes": plain[:place], "stream": stream})
    made = None
    if program is not None and weights:
        made = with_weights(transform(before, weights=False), program.weights)
    plan = plan_stream(before, weights=weights, transformer=made)
    if plan.ranks != 1:
        raise ValueError(
            f"passes: cut the stream for {plan.ranks} processes, and a bundle runs in one; export "
            "the recipe without the pass that does it, such as ulysses_stream"
        )
    attending = {"pages": "stored" if engines and engines.plugin else "decoded"}
    external = [{"externalise": attending}, *(["join_commit"] if engines else [])]
    after = plain[place:], [*external, *plain[place:]]
    reference, transformer = (
        run_passes(plan.transformer, configured_passes(recipe.model_copy(update={"passes": each})))
        for each in after
    )
    encoder = _text(folder, transformer.geometry, weights) if held else None
    decoder = plan.decoders[0].program
    if engines:
        check_formats((transformer, decoder), engines.sm)
        if engines.plugin:
            _check_kernels(transformer, engines.sm)
    return ExportPlan(recipe, reference, transformer, decoder, encoder, folder, engines)


def _check_kernels(program: Program, sm: int) -> None:
    """Refuse a plugin for what has nothing to run it for, or cannot be compiled."""
    sizes = kernel_sizes(program)
    if sizes is None:
        raise ValueError(
            "--attention plugin: is for pages in NVFP4, and the recipe has none; add nvfp4_cache, "
            "or use --attention native"
        )
    check_kernels(sizes, sm)


def _check_text(folder: Path) -> None:
    """Refuse a pipeline whose text encoder cannot be exported."""
    for part in ("text_encoder/config.json", f"tokenizer/{TOKENIZER}"):
        if not (folder / part).is_file():
            raise ValueError(
                f"{folder}: has no {part}, so its text encoder cannot be exported; keep it outside "
                "with --text reference"
            )


def _text(folder: Path, geometry: Geometry, weights: bool) -> Program:
    """A pipeline's text encoder."""
    captured = umt5.captured(folder / "text_encoder", geometry)
    program = run_passes(captured, [make_pass("canonicalise", {})])
    if not weights:
        return program
    return umt5.loaded(program, read_encoder(folder / "text_encoder", torch.float32))


def export(
    plan: ExportPlan,
    path: Path,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda what: None,
) -> Findings:
    """Write a bundle; arguments, result and errors as `write_bundle`'s."""
    program = plan.transformer
    recipe = plan.recipe.resolved()
    recipe["model"]["config"] = program.recipe["model"]["config"]  # whole, not by a name
    section = stream_section(plan.recipe.stream, "recipe")
    rows, columns = program.geometry.grid(program.spec)
    cases = chain(
        transformer_cases(plan.reference, program),
        *(plain_cases(stage, each) for stage, each in plan.stages.items() if each is not program),
    )
    if plan.text is None:
        text: str | TextFacts = TextFacts(
            folder=section.pipeline, digest=encoder_digest(plan.folder)
        )
    else:
        text = (plan.folder / "tokenizer" / TOKENIZER).read_text(encoding="utf-8")
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
        text,
        overwrite,
        note,
        plan.engines,
    )


@dataclass(frozen=True)
class EmittedGraph:
    """A graph of a bundle, before it is written.

    Attributes:
        nodes: how many it has.
        weights: bytes of the parameters that it reads.
        engine: whether an engine is built of it.
    """

    nodes: int
    weights: int
    engine: bool


def emitted(plan: ExportPlan) -> dict[str, EmittedGraph]:
    """The graphs of a bundle by name; needs no weights.

    Raises:
        ValueError: an op has no form in ONNX.
    """
    found = {}
    for stage, program in plan.stages.items():
        pool, models = emit(program, dialect_of(stage, plan.target))
        for name, model in models.items():
            own = model.graph.initializer
            weights = sum(pool[each.name].nbytes for each in own if each.name in pool)
            engine = plan.engines is not None and stage != TEXT
            found[f"{stage}/{name}"] = EmittedGraph(len(model.graph.node), weights, engine)
    return found


def _check(recipe: Recipe, dtype: str) -> None:
    """Refuse what this version does not export.

    Args:
        recipe: to export.
        dtype: what the target computes in.
    """
    if recipe.program != "stream":
        raise ValueError(f"program: {recipe.program} has no bundle; name a stream recipe")
    if recipe.model.dtype != dtype:
        raise ValueError(
            f"model.dtype: is {recipe.model.dtype}, and for this target lltk exports {dtype} "
            f"alone; set model.dtype={dtype}"
        )
    if recipe.geometry.batch != 1:
        raise ValueError(
            f"geometry.batch: is {recipe.geometry.batch}, and a bundle makes one video at a time; "
            "set geometry.batch=1"
        )
    decoder = stream_section(recipe.stream, "recipe").decoder
    if decoder.dtype != dtype:
        raise ValueError(
            f"stream.decoder.dtype: is {decoder.dtype}, and for this target lltk exports {dtype} "
            f"alone; set stream.decoder.dtype={dtype}"
        )
    if isinstance(decoder.device, tuple) and len(decoder.device) > 1:
        raise ValueError(
            "stream.decoder.device: names several, and a bundle holds one decoder; name one"
        )


def _name(entry: str | dict[str, Any]) -> str:
    """The name of a pass in a recipe."""
    return entry if isinstance(entry, str) else next(iter(entry))
