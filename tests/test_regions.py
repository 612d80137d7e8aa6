"""Layers share one block graph: compiled once however many they are, and bitwise the flat form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import (
    PASSES,
    after,
    difference,
    inputs,
    make_program,
    make_recipe,
    reached,
    run,
    same,
    tiny_config,
)
from torch import Tensor, fx

from lltk.graph.edit import calls
from lltk.graph.geometry import Kind
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program

cpu = pytest.mark.cpu
gpu = pytest.mark.gpu

GRAPHS: dict[Kind, tuple[str, ...]] = {
    "train": ("train",),
    "score": ("score",),
    "stream": ("prologue", "step", "commit"),
}
COMPILED: dict[Kind, list[str]] = {
    "train": ["train_block"],
    "score": ["score_block"],
    "stream": ["commit_block_{last}", "step_block"],
}
"""The regions that are compiled; the commit's blocks are the step's but for the last."""
KINDS = list(GRAPHS)
FEW, MANY = 2, 12


def flat(kind: Kind, layers: int = FEW) -> Program:
    return reached(kind, *PASSES[kind][:-2], layers=layers)


def regional(kind: Kind, layers: int = FEW) -> Program:
    return reached(kind, *PASSES[kind][:-1], layers=layers)


def lowered(kind: Kind, layers: int = FEW) -> Program:
    return reached(kind, *PASSES[kind], layers=layers)


class CountingBackend:
    """A torch.compile backend that keeps what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, example: Sequence[Tensor]) -> Any:
        self.graphs.append(graph)
        return graph.forward


def call(module: ProgramModule, program: Program, graph: str) -> dict[str, Tensor]:
    """Outputs of a graph, and what it wrote."""
    given = inputs(program, graph)
    result = module(graph, dict(given))
    arenas = {name: value for name, value in given.items() if "_pages_" in name}
    return result | arenas if graph == "commit" else result


def compiled_graphs(kind: Kind, layers: int) -> list[fx.GraphModule]:
    """The graphs that torch.compile makes of a program's blocks; they must not change results."""
    torch._dynamo.reset()
    program, backend = lowered(kind, layers), CountingBackend()
    eager, module = instantiate(program), instantiate(program)
    module.compile_blocks(backend=backend)
    with torch.set_grad_enabled(kind == "train"):
        for graph in GRAPHS[kind]:
            assert same(call(module, program, graph), call(eager, program, graph)), graph
    return backend.graphs


@cpu
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compile_once(kind: Kind) -> None:
    few, many = (compiled_graphs(kind, layers) for layers in (FEW, MANY))
    parted = kind == "stream"  # what stands before and after the attention
    assert len(few) == len(many) == len(COMPILED[kind]) + parted
    for a, b in zip(few, many, strict=True):
        assert [n.target for n in a.graph.nodes] == [n.target for n in b.graph.nodes]


@cpu
@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "arena", "reference"])
def test_filling_the_window_compiles_nothing_anew(implementation: str) -> None:
    torch._dynamo.reset()
    program, backend = lowered_to(regional("stream"), implementation), CountingBackend()
    eager, module = instantiate(program), instantiate(program)
    module.compile_blocks(backend=backend)
    for filled in range(program.geometry.pages):
        given = inputs(program, "step")
        given["table"] = given["table"][:filled]
        ours, theirs = (runner("step", dict(given)) for runner in (module, eager))
        assert same(ours, theirs) and len(backend.graphs) == 2, filled


@cpu
def test_a_graph_a_layer_would_be_counted() -> None:
    torch._dynamo.reset()
    program, backend = lowered("score"), CountingBackend()
    module = instantiate(program)
    for owner in module.blocks_by_path.values():
        copy = fx.GraphModule(torch.nn.Module(), program.regions["score_block"].graph)
        owner._regions = {"score_block": torch.compile(copy, backend=backend)}
    with torch.no_grad():
        call(module, program, "score")
    assert len(backend.graphs) == FEW


@cpu
@pytest.mark.parametrize("kind", KINDS)
def test_regional_is_flat_bitwise(kind: Kind) -> None:
    before, program = flat(kind), regional(kind)
    for graph in GRAPHS[kind]:
        given = inputs(program, graph)
        assert same(run(program, graph, given), run(before, graph, given)), graph
        assert given.keys() == program.contract(graph).inputs.keys()
        assert program.contract(graph) == before.contract(graph)


@cpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_inside_a_region_is_seen(kind: Kind) -> None:
    before, program = flat(kind), after(regional(kind))
    graph = GRAPHS[kind][-1]
    region = program.regions[f"{'step' if kind == 'stream' else graph}_block"].graph
    norm = calls(region, torch.ops.aten.layer_norm.default)[0]
    norm.update_arg(4, 1e-3)
    given = inputs(program, graph)
    assert not same(run(program, graph, given), run(before, graph, given))


@cpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_one_signature(kind: Kind) -> None:
    program = regional(kind)
    layers = program.spec.layers
    wanted = [name.format(last=layers - 1) for name in COMPILED[kind]]
    wanted += ["prologue_block"] if kind == "stream" else []
    assert sorted(program.regions) == sorted(wanted)
    shapes = {name: tuple(tensor.shape) for name, tensor in program.weights.items()}
    for name, graph in program.graphs.items():
        found = graph.find_nodes(op="call_module")
        assert [node.target for node in found] == [f"blocks.{i}" for i in range(layers)]
        for node in found:
            region = program.regions[str(node.args[0])]
            placeholders = region.graph.find_nodes(op="placeholder")
            given = [tuple(n.meta["val"].shape) for n in node.args[1:]]
            given += [shapes[f"{node.target}.{part}"] for part in region.parameters]
            assert given == [tuple(n.meta["val"].shape) for n in placeholders], name
        used = [str(node.args[0]) for node in found]
        assert (used[-1] == used[0]) == (name != "commit")


@cpu
def test_a_layer_that_differs_has_a_region_of_its_own() -> None:
    program = after(flat("score"))
    (graph,) = program.graphs.values()
    norm = [n for n in graph.nodes if n.meta.get("module") == "blocks.1.norm1"]
    norm[0].update_arg(4, 1e-3)
    program = after(program, "regionalise")
    assert sorted(program.regions) == ["score_block_0", "score_block_1"]


def trained(module: ProgramModule, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A train graph's prediction and every parameter's gradient."""
    sample = module("train", dict(given))["sample"]
    sample.square().mean().backward()
    return {"sample": sample.detach()} | {n: p.grad for n, p in module.named_parameters()}


def lowered_to(program: Program, implementation: str) -> Program:
    """The regional program, one implementation for its attention."""
    op = "paged_attention" if program.kind == "stream" else "block_causal_attention"
    return after(program, {"lower": {op: implementation}})


@cpu
@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_compiled_blocks_keep_gradients(implementation: str) -> None:
    torch._dynamo.reset()
    program = lowered_to(regional("train"), implementation)
    eager, module = instantiate(program), instantiate(program)
    module.compile_blocks(backend="aot_eager")
    given = inputs(program, "train")
    theirs = trained(eager, given)
    assert difference(trained(module, given), theirs) <= 1e-5
    module.zero_grad()
    halved = given | {"timestep": given["timestep"] / 2}
    assert difference(trained(module, halved), theirs) > 1e-2


@cpu
@torch.no_grad()
def test_inductor_keeps_steps() -> None:
    torch._dynamo.reset()
    program = lowered_to(regional("stream"), "reference")
    eager, module = instantiate(program), instantiate(program)
    module.compile_blocks(backend="inductor")
    for graph in ("step", "commit"):
        ours, theirs = (call(runner, program, graph) for runner in (module, eager))
        assert difference(ours, theirs) <= 1e-5, graph


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_trains(compiled: bool) -> None:
    torch._dynamo.reset()
    config = tiny_config(attention_head_dim=32)
    # 98 tokens a chunk: no whole number of FlexAttention's blocks.
    recipe = make_recipe("train", PASSES["train"][:-1], config=config, height=224, width=224)
    program = make_program(recipe)
    given = {name: value.cuda() for name, value in inputs(program, "train").items()}
    results = []
    for implementation in ("flex", "reference"):
        module = instantiate(lowered_to(program, implementation), "cuda")
        if compiled:
            module.compile_blocks()
        results.append(trained(module, given))
    assert difference(*results) <= 1e-4
    module = instantiate(lowered_to(program, "reference"), "cuda")
    halved = given | {"timestep": given["timestep"] / 2}
    assert difference(results[0], trained(module, halved)) > 1e-2


@gpu
@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_cudnn_steps(compiled: bool) -> None:
    torch._dynamo.reset()
    config = tiny_config(attention_head_dim=64)
    steps = PASSES["stream"][:-1]
    program = make_program(make_recipe("stream", steps, config=config, dtype="bfloat16"))
    given = {name: value.cuda() for name, value in inputs(program, "step").items()}
    results = []
    for implementation in ("cudnn", "reference"):
        module = instantiate(lowered_to(program, implementation), "cuda")
        if compiled:
            module.compile_blocks()
        results.append({n: t.float() for n, t in module("step", dict(given)).items()})
    assert difference(*results) <= 5e-2
    short = module("step", given | {"table": given["table"][:1]})
    assert difference({n: t.float() for n, t in short.items()}, results[1]) > 1e-1
