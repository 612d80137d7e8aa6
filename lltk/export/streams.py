"""What a stream relies on in a bundle's manifest: recipe, models and contracts fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch

from lltk.export.facts import DECODER, KERNELS, ORT, TEXT, TRANSFORMER, Facts
from lltk.graph.contract import Contract, Role, TensorSpec, commit_graph, page_output
from lltk.graph.geometry import Geometry
from lltk.graph.recipe import parse_recipe
from lltk.graph.spec import DecoderSpec, ModelSpec, TextSpec
from lltk.graph.text import dtype_name
from lltk.graph.verify import STEP_HIGH
from lltk.stream.recipe import StreamSection, stream_section
from lltk.stream.runtimes.cubin import FACTS
from lltk.stream.sampler import Schedule

_FLOAT = torch.float32


def contradictions(facts: Facts) -> Iterator[str]:
    """What in a manifest is not that of a stream, or not as its recipe and its models ask for.

    What comes later relies on there being nothing before it.
    """
    try:
        recipe = parse_recipe(facts.recipe, "recipe")
        section = stream_section(recipe.stream, "recipe")
    except ValueError as error:
        yield str(error)
        return
    stages, geometry = facts.stages, recipe.geometry
    if recipe.program != "stream" or geometry.batch != 1:
        yield "recipe: is not of a stream of one video"
    if not isinstance(recipe.model.config, dict):
        yield "recipe: has no configuration of its model"
    yield from _graphs(facts)
    yield from _engines(facts)
    model, decoder = stages[TRANSFORMER].model, stages[DECODER].model
    fits = isinstance(model, ModelSpec) and isinstance(decoder, DecoderSpec)
    if not fits or (TEXT in stages and not isinstance(stages[TEXT].model, TextSpec)):
        yield "a stage has the model of another"
    assert isinstance(model, ModelSpec) and isinstance(decoder, DecoderSpec)
    for stage, spec in (TRANSFORMER, model), (DECODER, decoder):
        if min(spec.channels, *spec.patch, *spec.stride) < 1:
            yield f"{stage}: its model has a size below 1"
    try:
        rows, columns = geometry.grid(model)
    except ValueError as error:
        yield str(error)
        return
    split, theta = list(model.rope_split), model.rope_theta
    if facts.rotary != {"rows": rows, "columns": columns, "split": split, "theta": theta}:
        yield "rotary: is not as model and geometry ask for"
    if min(split) < 0 or any(width % 2 for width in split) or theta <= 0:
        yield "rotary: its split has odd or negative widths, or its theta is not positive"
    yield from _sampler(facts, section)
    contracts = {
        f"{stage}/{name}": graph.contract
        for stage, each in stages.items()
        for name, graph in each.graphs.items()
    }
    dtype = torch.float32 if facts.target == ORT else torch.bfloat16
    parts = [
        _transformer(contracts, geometry, model, dtype),
        _decoder(contracts, geometry, decoder, dtype),
    ]
    parts += [_text(contracts)] if TEXT in stages else []
    for graph, contract in chain.from_iterable(parts):
        yield from _differences(graph, contracts[graph], contract)


def _graphs(facts: Facts) -> Iterator[str]:
    """Graphs of a stream that are not there, and others that are."""
    stages = facts.stages
    found = {f"{stage}/{graph}" for stage, each in stages.items() for graph in each.graphs}
    held = stages[TRANSFORMER].graphs if TRANSFORMER in stages else {}
    commit = commit_graph({name: each.contract for name, each in held.items()})
    needed = [f"{TRANSFORMER}/{graph}" for graph in dict.fromkeys(("prologue", "step", commit))]
    needed += [f"{DECODER}/{graph}" for graph in ("first", "step")]
    needed += [f"{TEXT}/encode"] if facts.text is None else []
    if TRANSFORMER in stages and stages[TRANSFORMER].high_steps:
        needed.append(f"{TRANSFORMER}/{STEP_HIGH}")
    for graph in needed:
        if graph not in found:
            yield f"has no graph {graph}, so it plays no stream"
    for graph in sorted(found - {*needed, f"{DECODER}/steps"}):
        yield f"has a graph {graph}, which its stream does not run"


def _engines(facts: Facts) -> Iterator[str]:
    """Engines of graphs that are not there, or of other graphs than there are."""
    if (facts.engines is None) != (facts.target == ORT):
        yield f"engines: a bundle for {facts.target} has {'some' if facts.engines else 'none'}"
    if facts.engines is None:
        return
    wanted = [
        (stage, graph)
        for stage, each in facts.stages.items()
        if stage != TEXT
        for graph in each.graphs
    ]
    if sorted((each.stage, each.graph) for each in facts.engines.built) != sorted(wanted):
        yield "engines: are not one of each graph of transformer and decoder"
    kernels, whole = facts.engines.kernels, f"{KERNELS}/{FACTS}"
    if kernels and (whole not in kernels or any(not k.startswith(f"{KERNELS}/") for k in kernels)):
        yield f"engines: their kernels are not {whole} and what it launches"


def _sampler(facts: Facts, section: StreamSection) -> Iterator[str]:
    wanted = Schedule.make(section.steps, section.shift).table
    found = [value for row in facts.sampler for value in row]
    rows = {len(row) for row in facts.sampler}
    if len(facts.sampler) != section.steps or rows != {wanted.shape[1]}:
        yield f"sampler: is not a row of {wanted.shape[1]} for each of {section.steps} passes"
    elif not torch.allclose(torch.tensor(found), wanted.flatten(), rtol=1e-4, atol=1e-5):
        yield f"sampler: is not that of {section.steps} passes with a shift of {section.shift}"


def _transformer(
    contracts: Mapping[str, Contract], geometry: Geometry, model: ModelSpec, dtype: torch.dtype
) -> Iterator[tuple[str, Contract]]:
    """What the transformer's graphs take and give, from what ``step`` says of prompts and pages."""
    own = {
        name.rpartition("/")[2]: each
        for name, each in contracts.items()
        if name.startswith(f"{TRANSFORMER}/")
    }
    step, prologue, commit = own["step"], own["prologue"], commit_graph(own)
    tokens = geometry.chunk * geometry.frame_tokens(model)
    size = 1, model.channels, geometry.chunk, *geometry.latent(model)
    table = 1, tokens, 1, sum(model.rope_split)
    moving = {
        Role.LATENTS: TensorSpec(size, dtype),
        Role.TIME: TensorSpec((1, geometry.chunk), _FLOAT),
        Role.ROTARY_COS: TensorSpec(table, _FLOAT),
        Role.ROTARY_SIN: TensorSpec(table, _FLOAT),
        Role.LISTED: TensorSpec((geometry.pages,), torch.bool),
    }
    pages = {
        name: TensorSpec((1, geometry.pages, *spec.shape[2:]), spec.dtype, spec.role)
        for name, spec in step.pages.items()
    }
    prompt = step.having(Role.PROMPT)
    given = {name: TensorSpec(spec.shape, spec.dtype) for name, spec in prompt.items()}
    inputs = {**_having(step, moving), **prompt, **pages}
    latents = {model.output: moving[Role.LATENTS]}
    text = {Role.TEXT: TensorSpec((1, geometry.text_tokens, model.text_dim), dtype)}
    yield f"{TRANSFORMER}/prologue", Contract(_having(prologue, text), given)
    made = {
        page_output(name): TensorSpec((1, *spec.shape[2:]), spec.dtype)
        for name, spec in pages.items()
    }
    for name in [each for each in ("step", "commit", STEP_HIGH) if each in own]:
        read = inputs if name == "step" else _read(own[name], inputs)
        gives = {} if name == "commit" else latents
        yield f"{TRANSFORMER}/{name}", Contract(read, gives | (made if name == commit else {}))


def _decoder(
    contracts: Mapping[str, Contract], geometry: Geometry, decoder: DecoderSpec, dtype: torch.dtype
) -> Iterator[tuple[str, Contract]]:
    """What the decoder's graphs take and give, from what ``step`` says of its caches."""
    step = contracts[f"{DECODER}/step"]
    pairs = zip(decoder.cache_inputs, decoder.cache_outputs, strict=True)
    caches = [(*names, step.inputs[names[0]]) for names in pairs if names[0] in step.inputs]
    held = {name: TensorSpec(spec.shape, spec.dtype, Role.CACHE) for name, _, spec in caches}
    kept = {name: TensorSpec(spec.shape, spec.dtype) for _, name, spec in caches}
    for graph in ("first", "step", "steps"):
        own = contracts.get(name := f"{DECODER}/{graph}")
        if own is None:
            continue
        given = [*own.having(Role.LATENTS).values()]
        count = given[0].shape[2] if graph == "steps" and given and len(given[0].shape) > 2 else 1
        size = 1, decoder.channels, count, *geometry.latent(decoder)
        frames = 1 if graph == "first" else count * decoder.stride[0]
        video = TensorSpec((1, 3, frames, geometry.height, geometry.width), dtype)
        inputs = _having(own, {Role.LATENTS: TensorSpec(size, _FLOAT)})
        inputs |= {} if graph == "first" else held
        yield name, Contract(inputs, {decoder.output: video, **kept})


def _text(contracts: Mapping[str, Contract]) -> Iterator[tuple[str, Contract]]:
    """What the text encoder takes and gives, from what ``prologue`` takes."""
    (text,) = contracts[f"{TRANSFORMER}/prologue"].inputs.values()
    own = contracts[name := f"{TEXT}/encode"]
    tokens = {
        role: TensorSpec(text.shape[:2], dtype)
        for role, dtype in ((Role.TOKENS, torch.int64), (Role.TOKEN_MASK, torch.bool))
    }
    output = next(iter(own.outputs), "embedding")
    made = TensorSpec(text.shape, _FLOAT)
    yield name, Contract(_having(own, tokens), {output: made})


def _having(contract: Contract, specs: Mapping[Role, TensorSpec]) -> dict[str, TensorSpec]:
    """Specs by the name of the input that has their role; the role's where there is none."""
    return {
        next(iter(contract.having(role)), str(role)): TensorSpec(spec.shape, spec.dtype, role)
        for role, spec in specs.items()
    }


def _read(contract: Contract, inputs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Those of the inputs that a graph reads. It always reads the latents."""
    return {
        name: spec
        for name, spec in inputs.items()
        if name in contract.inputs or spec.role is Role.LATENTS
    }


def _differences(graph: str, found: Contract, wanted: Contract) -> Iterator[str]:
    """Inputs and outputs of a graph that are not as they should be."""
    for ours, theirs in (found.inputs, wanted.inputs), (found.outputs, wanted.outputs):
        for name in sorted(ours.keys() | theirs.keys()):
            one, other = (spec_text(each.get(name)) for each in (ours, theirs))
            if one != other:
                yield f"{graph}: {name} is {one} there, and {other} in a stream of its recipe"


def spec_text(spec: TensorSpec | None) -> str:
    """A tensor as an error names it."""
    if spec is None:
        return "nothing"
    kind = f"{dtype_name(spec.dtype)}[{', '.join(map(str, spec.shape))}]"
    return kind if spec.role is None else f"{kind} ({spec.role})"
