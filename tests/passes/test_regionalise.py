"""regionalise: layers, and step and commit, share block graphs; nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers import PASSES, after, hand_made, inputs, reached, refused, run, same, texts

from lltk.graph.edit import calls
from lltk.graph.geometry import Kind
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu
aten = torch.ops.aten

BEFORE = """
    def score(hidden_states: latents(f32[1, 4, 3])):
        # root
        exp: f32[1, 4, 3] = aten.exp.default(hidden_states)
        # blocks.0.ffn
        linear: f32[1, 4, 3] = aten.linear.default(hidden_states, self['blocks.0.ffn.weight'])
        add: f32[1, 4, 3] = aten.add.Tensor(linear, exp)
        # blocks.1.ffn
        linear_1: f32[1, 4, 3] = aten.linear.default(add, self['blocks.1.ffn.weight'])
        add_1: f32[1, 4, 3] = aten.add.Tensor(linear_1, exp)
        # root
        neg: f32[1, 4, 3] = aten.neg.default(add_1)
        return {'sample': neg}
"""
SCORE = """
def score(hidden_states: latents(f32[1, 4, 3])):
    # root
    exp: f32[1, 4, 3] = aten.exp.default(hidden_states)
    # blocks.0
    blocks_0: (f32[1, 4, 3],) = self['blocks.0']('score_block', hidden_states, exp)
    getitem: f32[1, 4, 3] = getitem(blocks_0, 0)
    # blocks.1
    blocks_1: (f32[1, 4, 3],) = self['blocks.1']('score_block', getitem, exp)
    getitem_1: f32[1, 4, 3] = getitem(blocks_1, 0)
    # root
    neg: f32[1, 4, 3] = aten.neg.default(getitem_1)
    return {'sample': neg}
"""
BLOCK = """
def score_block(hidden_states: f32[1, 4, 3], exp: f32[1, 4, 3], ffn_weight: parameter(f32[3, 3])):
    # ffn
    linear: f32[1, 4, 3] = aten.linear.default(hidden_states, ffn_weight)
    add: f32[1, 4, 3] = aten.add.Tensor(linear, exp)
    return (add,)
"""


def made(score: str) -> Program:
    weights = {f"blocks.{layer}.ffn.weight": torch.randn(3, 3) for layer in range(2)}
    return hand_made("score", Stage.CAUSAL, {"score": score}, weights, layers=2)


def test_rewrites_the_text() -> None:
    program = after(made(BEFORE), "regionalise")
    assert texts(program) == {"score": SCORE.lstrip(), "score_block": BLOCK.lstrip()}
    assert program.regions["score_block"].parameters == ("ffn.weight",)


def test_layers_that_differ_have_regions_of_their_own() -> None:
    differ = BEFORE.replace("aten.add.Tensor(linear_1, exp)", "aten.mul.Tensor(linear_1, exp)")
    program = after(made(differ), "regionalise")
    assert program.log[-1].matches == {"score_block_0": 1, "score_block_1": 1}
    given = inputs(program, "score")
    assert same(run(program, "score", given), run(made_like(program, differ), "score", given))


def made_like(program: Program, score: str) -> Program:
    return hand_made("score", Stage.CAUSAL, {"score": score}, program.weights, layers=2)


@pytest.mark.parametrize("layers", [1, 2])
def test_step_and_commit_share_all_blocks_but_the_last(layers: int) -> None:
    program = reached("stream", *PASSES["stream"][:7], layers=layers)
    last = "commit_block" if layers == 1 else f"commit_block_{layers - 1}"
    assert program.log[-1].matches == {
        "prologue_block": layers,
        "step_block": 2 * layers - 1,
        last: 1,
    }
    called = {
        name: [(node.target, node.args[0]) for node in graph.nodes if node.op == "call_module"]
        for name, graph in program.graphs.items()
    }
    owners = [f"blocks.{layer}" for layer in range(layers)]
    assert called == {
        "prologue": [(owner, "prologue_block") for owner in owners],
        "step": [(owner, "step_block") for owner in owners],
        "commit": [(owner, "step_block") for owner in owners[:-1]] + [(owners[-1], last)],
    }


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["train", "score"])
def test_layers_share_one_block(kind: Kind, layers: int) -> None:
    program = reached(kind, *PASSES[kind][:6], layers=layers)
    assert program.log[-1].matches == {f"{kind}_block": layers}


@pytest.mark.parametrize("kind", PASSES)
def test_outputs_keep_their_bits(kind: Kind) -> None:
    steps = PASSES[kind][: PASSES[kind].index("regionalise") + 1]
    before, program = reached(kind, *steps[:-1]), reached(kind, *steps)
    assert program.graphs.keys() == before.graphs.keys()
    for name in program.graphs:
        assert program.contract(name) == before.contract(name)
        given = inputs(program, name)
        wanted = run(before, name, given)
        assert same(run(program, name, given), wanted)
        assert not same(run(unbiased(program), name, given), wanted)


def unbiased(program: Program) -> Program:
    """The program without the bias of each region's first linear."""
    program = after(program)
    for region in program.regions.values():
        linear = calls(region.graph, aten.linear.default)[0]
        linear.args = linear.args[:2]
    return program


def test_owners_hold_diffusers_parameters() -> None:
    program = reached("stream", *PASSES["stream"][:7])
    module = instantiate(program)
    assert set(module.state_dict()) == set(program.weights)
    assert list(module.blocks_by_path) == ["blocks.0", "blocks.1"]
    for region in program.regions.values():
        for name in region.parameters:
            assert f"blocks.0.{name}" in program.weights
        assert not region.graph.find_nodes(op="get_attr")


def test_page_writes_stay_outside_the_regions() -> None:
    program = reached("stream", *PASSES["stream"][:7])
    write = torch.ops.lltk.write_page.default
    assert len(calls(program.graphs["commit"], write)) == 4
    assert not any(calls(region.graph, write) for region in program.regions.values())


def test_graph_without_blocks_is_refused() -> None:
    message = refused(after, made(BEFORE.replace("# blocks.", "# layers.")), "regionalise")
    assert message.startswith("regionalise: matched nothing: the graphs hold no candidate for it")
