"""Tiny programs, weights that make attention matter, inputs, and comparisons, for all tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lltk.compiler import transform, with_weights
from lltk.graph.contract import Role, TensorSpec
from lltk.graph.edit import module_of, output
from lltk.graph.geometry import Geometry, Kind
from lltk.graph.infer import infer
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.passes import run_passes
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.graph.spec import ModelSpec
from lltk.graph.stages import Stage
from lltk.graph.text import parse, print_graph
from lltk.models import wan22
from lltk.models.configs import named_config, validate_config
from lltk.passes import make_pass
from lltk.train.data import Batch

Run = Callable[..., tuple[int, str, str]]
"""Runs the command: exit code, output, errors; see conftest.py."""
Steps = Sequence[str | Mapping[str, Mapping[str, Any]]]

CANONICAL = ("canonicalise", "per_frame_timesteps", "frame_positions")
PASSES: dict[Kind, tuple[str, ...]] = {
    "train": (*CANONICAL, "text_per_chunk", "teacher_forcing", "regionalise", "lower"),
    "score": (*CANONICAL, "text_per_chunk", "block_causal", "regionalise", "lower"),
    "stream": (*CANONICAL, "hoist_text", "cached_step", "commit", "regionalise", "lower"),
    "reference": (*CANONICAL, "text_per_chunk", "bidirectional", "regionalise"),
}
"""Each kind's passes, as the shipped recipes list them."""

GEOMETRY = {
    "height": 64,
    "width": 64,
    "chunk": 2,
    "window": 8,
    "sink": 2,
    "frames": 6,
    "text_tokens": 5,
}
"""A latent frame has 2×2 tokens."""


def tiny_config(layers: int = 2, **sizes: Any) -> dict[str, Any]:
    """A WanTransformer3DModel configuration that runs in milliseconds."""
    small = {
        "num_layers": layers,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "text_dim": 16,
        "freq_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
    }
    return validate_config(named_config("tiny") | small | sizes)


def randomise(state: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Weights of ``state``'s shapes and dtypes, large enough that attention matters.

    Norm weights lie about 1, other vectors are small, matrices keep the scale of their input.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in state.items():
        value = torch.randn(tensor.shape, generator=generator)
        if name.endswith("weight") and tensor.dim() > 1:
            value *= 1.5 / tensor[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.3 * value
        else:
            value *= 0.3
        made[name] = _packed(value, tensor.dtype) if _is_packed(name) else value.to(tensor.dtype)
    return made


def _is_packed(name: str) -> bool:
    """Whether it is a part of a quantised weight."""
    endings = ("weight_codes", "weight_scales", "weight_decode_scale", "weight_row_scales")
    return name.endswith(endings)


def _packed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A part of a quantised weight, made from normal numbers: any codes, and scales above 0."""
    return (64 * value).abs().to(dtype) if dtype == torch.uint8 else (value.abs() + 0.1).to(dtype)


def make_recipe(
    kind: Kind,
    passes: Steps | None = None,
    *,
    layers: int = 2,
    config: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    **geometry: Any,
) -> Recipe:
    """A recipe of the tiny model; ``geometry`` overrides `GEOMETRY`."""
    return parse_recipe(
        {
            "program": kind,
            "model": {"config": dict(config or tiny_config(layers)), "dtype": dtype},
            "geometry": GEOMETRY | geometry,
            "passes": list(PASSES[kind] if passes is None else passes),
        },
        "test recipe",
    )


def make_program(recipe: Recipe, seed: int | None = 0) -> Program:
    """The recipe's Program; with random weights unless ``seed`` is None."""
    program = transform(recipe, weights=False)
    return program if seed is None else with_weights(program, randomise(program.weights, seed))


def runnable(recipe: Recipe, seed: int = 0) -> tuple[Program, ProgramModule]:
    """The recipe's Program with random weights, and its module."""
    program = make_program(recipe, seed)
    return program, instantiate(program)


def captured(
    kind: Kind, *, layers: int = 2, dtype: str = "float32", head_dim: int = 12, **geometry: Any
) -> Program:
    """The tiny model as captured, with random weights; shared, so not to be changed."""
    return reached(kind, layers=layers, dtype=dtype, head_dim=head_dim, **geometry)


def after(program: Program, *steps: str | Mapping[str, Mapping[str, Any]]) -> Program:
    """The program with passes run on a copy."""
    pairs = [(s, {}) if isinstance(s, str) else next(iter(s.items())) for s in steps]
    return run_passes(program, [make_pass(name, options) for name, options in pairs])


def reached(
    kind: Kind,
    *steps: str,
    layers: int = 2,
    dtype: str = "float32",
    head_dim: int = 12,
    **geometry: Any,
) -> Program:
    """`captured` with passes run; shared, so not to be changed."""
    return _reached(kind, steps, (layers, head_dim), dtype, tuple(sorted(geometry.items())))


@cache
def _reached(
    kind: Kind,
    steps: tuple[str, ...],
    model: tuple[int, int],
    dtype: str,
    sizes: tuple[tuple[str, Any], ...],
) -> Program:
    if steps:
        return after(_reached(kind, steps[:-1], model, dtype, sizes), steps[-1])
    geometry = Geometry(**(GEOMETRY | dict(sizes)))
    layers, head_dim = model
    config = tiny_config(layers, attention_head_dim=head_dim)
    program = wan22.captured(config, kind, geometry, getattr(torch, dtype))
    return with_weights(program, randomise(program.weights))


def inputs(program: Program, graph: str, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a named graph; timesteps, positions, pages and tables are valid ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _value(program, spec, generator)
        for name, spec in program.contract(graph).inputs.items()
    }


def _value(program: Program, spec: TensorSpec, generator: torch.Generator) -> Tensor:
    if spec.role in (Role.POSITIONS, Role.PAGE_POSITIONS, Role.TABLE):
        return torch.arange(spec.shape[0], dtype=spec.dtype)
    if spec.role is Role.SLOT:
        return torch.tensor([program.geometry.pages - 1])
    if spec.role is Role.TIME:
        return torch.rand(spec.shape, generator=generator) * 1000
    if spec.dtype == torch.bool:
        return torch.rand(spec.shape, generator=generator) < 0.5
    if spec.dtype == torch.uint8:
        return torch.randint(256, spec.shape, dtype=spec.dtype, generator=generator)
    return torch.randn(spec.shape, generator=generator).to(spec.dtype)


def clips(program: Program, seed: int = 0, **more: Tensor) -> Batch:
    """Random clips for a training call, drawn with seed 7; ``more`` are further tensors of it."""
    geometry, spec = program.geometry, program.spec
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.batch, spec.channels, geometry.frames, *geometry.latent(spec))
    text = (geometry.batch, geometry.chunks, geometry.text_tokens, spec.text_dim)
    tensors = {
        "latents": torch.randn(shape, generator=generator),
        "text": torch.randn(text, generator=generator),
    }
    return Batch(7, range(geometry.batch), tensors | more)


@torch.no_grad()
def run(
    program: Program, graph: str, given: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A named graph's outputs, and the inputs it wrote to; ``given`` is left as it is.

    ``dtype`` replaces every floating dtype of weights and inputs.
    """
    module = instantiate(program, dtype=dtype)
    cast = {n: v.to(dtype) if dtype and v.is_floating_point() else v for n, v in given.items()}
    return _outputs(lambda **inputs: module(graph, inputs), cast)


class _OneGraph(nn.Module):
    def __init__(self, module: ProgramModule, graph: str) -> None:
        super().__init__()
        self.module = module
        self.graph = graph

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self.module(self.graph, inputs)


@torch.no_grad()
def reexported(program: Program, graph: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `run` gives if the graph is first exported again by torch.export."""
    module = _OneGraph(instantiate(program), graph)
    example = {name: value.clone() for name, value in given.items()}
    exported = torch.export.export(module, (), example, strict=False)
    return _outputs(exported.module(), given)


def _outputs(
    call: Callable[..., Mapping[str, Tensor]], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The call's outputs, and the inputs that it wrote to."""
    copies = {name: value.clone() for name, value in given.items()}
    result = dict(call(**copies))
    written = {n: value for n, value in copies.items() if not torch.equal(value, given[n])}
    return result | written


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest difference over the outputs, relative to each one's largest value."""
    assert ours.keys() == theirs.keys(), f"{sorted(ours)} are not {sorted(theirs)}"
    each = [(ours[name] - theirs[name]).abs().max() / theirs[name].abs().max() for name in ours]
    return float(torch.stack(each).max())


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether the outputs have equal bits."""
    return ours.keys() == theirs.keys() and all(_equal(ours[n], theirs[n]) for n in ours)


def compare_results(
    plain: Program, program: Program, graph: str, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    """Both give equal bits, and other bits once the input of this name is changed."""
    given = inputs(plain, graph)
    wanted = run(plain, graph, given)
    assert same(run(program, graph, given), wanted)
    given[name] = change(given[name])
    assert not same(run(program, graph, given), wanted)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype == b.dtype == torch.float8_e4m3fn:  # torch cannot compare them
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


HAND_SPEC = ModelSpec(
    layers=1,
    heads=2,
    head_dim=12,
    channels=4,
    text_dim=3,
    patch=(1, 2, 2),
    stride=(4, 16, 16),
    rope_theta=10000.0,
    rope_split=(4, 4, 4),
    block="blocks.{layer}",
    self_attention="blocks.{layer}.attn1",
    cross_attention="blocks.{layer}.attn2",
    linears=wan22.LINEARS,
    rope="rope",
    rope_tables=("rope.freqs_cos", "rope.freqs_sin"),
    output="sample",
    keep_fp32=("scale_shift_table",),
)


def hand_made(
    kind: Kind,
    stage: Stage,
    texts: Mapping[str, str],
    weights: Mapping[str, Tensor] | None = None,
    constants: Mapping[str, Tensor] | None = None,
    layers: int = 1,
    head_dim: int = 12,
    **geometry: Any,
) -> Program:
    """A Program whose graphs are read from text."""
    values = {**(weights or {}), **(constants or {})}
    return Program(
        kind,
        replace(HAND_SPEC, layers=layers, head_dim=head_dim),
        Geometry(**(GEOMETRY | geometry)),
        torch.float32,
        graphs={name: parse(dedent(text).strip(), values) for name, text in texts.items()},
        weights=dict(weights or {}),
        constants=dict(constants or {}),
        stage=stage,
    )


def texts(program: Program) -> dict[str, str]:
    """Every graph and region as text, by name."""
    return {name: print_graph(graph, name) for name, graph in program.every_graph()}


def text(program: Program, name: str) -> str:
    """One graph or region as text, in the form of a dedented literal."""
    return texts(program)[name].strip()


def refused(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of the ValueError that the action raises."""
    with pytest.raises(ValueError) as caught:
        action(*arguments, **options)
    return str(caught.value)


def masked(program: Program, template: str, allowed: Tensor) -> Program:
    """The program with an explicit mask on its dense attentions in modules of ``template``.

    ``allowed`` is bool [queries, keys]: True where a query sees a key.
    """
    program = after(program)
    program.constants["mask"] = allowed
    target = torch.ops.aten.scaled_dot_product_attention.default
    for graph in program.graphs.values():
        with graph.inserting_before(next(iter(graph.nodes))):
            mask = graph.create_node("get_attr", "mask")
        for node in graph.find_nodes(op="call_function", target=target):
            if program.spec.layer_of(module_of(node), template) is not None:
                node.args = (*node.args, mask)
    return program


def exposing(program: Program, graph: str, values: Mapping[str, str]) -> Program:
    """The program with further outputs: name → node name."""
    program = after(program)
    nodes = {node.name: node for node in program.graphs[graph].nodes}
    end = output(program.graphs[graph])
    end.args = (dict(end.args[0]) | {name: nodes[node] for name, node in values.items()},)
    infer(program, program.graphs[graph])
    return program


def chunk_mask(rows: Sequence[Sequence[int]], chunk_tokens: int) -> Tensor:
    """A token mask from the chunks that each chunk sees."""
    chunks = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for row, seen in enumerate(rows):
        chunks[row, list(seen)] = True
    return chunks.repeat_interleave(chunk_tokens, 0).repeat_interleave(chunk_tokens, 1)
