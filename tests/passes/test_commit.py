"""commit: the step's K/V at t = 0 go to one page, and nothing else is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import CANONICAL, after, exposing, hand_made, inputs, reached, refused, run, same, text
from torch import Tensor

from lltk.graph.edit import calls, module_of
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.graph.text import target_name
from lltk.ops.implementations import overload
from lltk.passes import make_pass

PAGED_ATTENTION = overload("paged_attention")

pytestmark = pytest.mark.cpu

PROLOGUE = """
    def prologue(encoder_hidden_states: text(f32[1, 8, 2, 3])):
        # root
        neg: f32[1, 8, 2, 3] = aten.neg.default(encoder_hidden_states)
        return {'cross_k_0': neg}
"""
STEP = """
    def step(hidden_states: latents(f32[1, 8, 2, 3]), timestep: time(f32[1, 2]),
             cross_k_0: prompt(f32[1, 8, 2, 3]), table: table(i64[3]),
             k_pages_0: pages(f32[1, 4, 8, 2, 3]), v_pages_0: pages(f32[1, 4, 8, 2, 3])):
        # blocks.0.attn1
        sub: f32[1, 8, 2, 3] = aten.sub.Tensor(hidden_states, cross_k_0)
        exp: f32[1, 2] = aten.exp.default(timestep)
        sum_1: f32[1] = aten.sum.dim_IntList(exp, [1])
        mul: f32[1, 8, 2, 3] = aten.mul.Tensor(hidden_states, sum_1)
        attention: f32[1, 8, 2, 3] = \
lltk.paged_attention.default(sub, hidden_states, mul, k_pages_0, v_pages_0, table)
        # blocks.0.attn2
        add: f32[1, 8, 2, 3] = aten.add.Tensor(attention, cross_k_0)
        return {'sample': add}
"""
COMMIT = """
def commit(hidden_states: latents(f32[1, 8, 2, 3]), k_pages_0: pages(f32[1, 4, 8, 2, 3]), \
v_pages_0: pages(f32[1, 4, 8, 2, 3]), slot: slot(i64[1])):
    # root
    new_zeros: f32[1, 2] = aten.new_zeros.default(hidden_states, [1, 2])
    # blocks.0.attn1
    exp: f32[1, 2] = aten.exp.default(new_zeros)
    sum_1: f32[1] = aten.sum.dim_IntList(exp, [1])
    mul: f32[1, 8, 2, 3] = aten.mul.Tensor(hidden_states, sum_1)
    write_page: None = lltk.write_page.default(k_pages_0, hidden_states, slot)
    write_page_1: None = lltk.write_page.default(v_pages_0, mul, slot)
    return {}
"""
STEPS = (*CANONICAL, "hoist_text", "cached_step")


def test_rewrites_the_text() -> None:
    before = hand_made("stream", Stage.CANONICAL, {"prologue": PROLOGUE, "step": STEP})
    program = after(before, "commit")
    assert text(program, "commit") == COMMIT.strip()
    assert [text(program, name) for name in before.graphs] == [
        text(before, name) for name in before.graphs
    ]


@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int) -> None:
    """There is one dead tail, of the last block and the head, however many layers come before."""
    matches = reached("stream", *STEPS, "commit", layers=layers).log[-1].matches
    assert matches["pages"] == 2 * layers
    assert matches["dead"] == reached("stream", *STEPS, "commit").log[-1].matches["dead"]


def test_last_block_ends_at_its_keys_and_values() -> None:
    graph = reached("stream", *STEPS, "commit").graphs["commit"]
    last = [node for node in graph.nodes if module_of(node).startswith("blocks.1")]
    parameters = [str(node.target) for node in last if node.op == "get_attr"]
    assert sorted(parameters) == [
        "blocks.1.attn1.norm_k.weight",
        "blocks.1.attn1.to_k.bias",
        "blocks.1.attn1.to_k.weight",
        "blocks.1.attn1.to_v.bias",
        "blocks.1.attn1.to_v.weight",
        "blocks.1.scale_shift_table",
    ]
    operators = [target_name(node) for node in last if node.op == "call_function"]
    modulated_norm = [
        *("aten.unsqueeze.default", "aten.add.Tensor", "aten.chunk.default"),
        *("getitem", "getitem", "aten.squeeze.dim", "aten.squeeze.dim"),
        *("aten.layer_norm.default", "aten.add.Tensor", "aten.unflatten.int"),
        *("aten.unsqueeze.default", "aten.mul.Tensor", "aten.unsqueeze.default"),
        *("aten.add.Tensor", "aten.flatten.using_ints"),
    ]
    keys_and_values = [
        *("aten.linear.default", "aten.linear.default", "aten.rms_norm.default"),
        *("aten.unflatten.int", "aten.unflatten.int"),
    ]
    rope_of_keys = [
        *("aten.unflatten.int", "aten.unbind.int", "getitem", "getitem"),
        *("aten.slice.Tensor", "aten.slice.Tensor", "aten.mul.Tensor", "aten.mul.Tensor"),
        *("aten.sub.Tensor", "aten.mul.Tensor", "aten.mul.Tensor", "aten.add.Tensor"),
        *("aten.stack.default", "aten.flatten.using_ints"),
    ]
    writes = ["lltk.write_page.default", "lltk.write_page.default"]
    assert operators == modulated_norm + keys_and_values + rope_of_keys + writes


@pytest.mark.parametrize("layers", [1, 2])
def test_no_input_is_left_over(layers: int) -> None:
    program = reached("stream", *STEPS, "commit", layers=layers)
    earlier = [f"cross_{part}_{layer}" for layer in range(layers - 1) for part in "kv"]
    pages = [f"{part}_pages_{layer}" for layer in range(layers) for part in "kv"]
    table = ["table"] if earlier else []
    contract = program.contract("commit")
    assert list(contract.inputs) == ["hidden_states", "positions", *earlier, *table, *pages, "slot"]
    assert not contract.outputs
    graph = program.graphs["commit"]
    assert all(node.users for node in graph.nodes if node.op in ("placeholder", "get_attr"))


def step_keys(program: Program, given: dict[str, Tensor], time: float) -> dict[str, Tensor]:
    """The K and V that the step attends with at one timestep, by page name."""
    kept = {}
    for layer, node in enumerate(calls(program.graphs["step"], PAGED_ATTENTION)):
        kept[f"k_pages_{layer}"], kept[f"v_pages_{layer}"] = (arg.name for arg in node.args[1:3])
    names = {f"own_{page}": node for page, node in kept.items()}
    every = inputs(program, "step") | given
    every["timestep"] = torch.full_like(every["timestep"], time)
    result = run(exposing(program, "step", names), "step", every)
    return {page: result[f"own_{page}"] for page in kept}


def test_pages_get_the_steps_bits() -> None:
    program = reached("stream", *STEPS, "commit")
    given = inputs(program, "commit", seed=1) | {"table": torch.tensor([0, 2])}
    shared = {name: value for name, value in given.items() if name != "slot"}
    written = run(program, "commit", given)
    page = {name: pages[:, int(given["slot"])] for name, pages in written.items()}
    assert same(page, step_keys(program, shared, 0))
    assert not same(page, step_keys(program, shared, 500))


@pytest.mark.parametrize("slot", [0, 2])
def test_other_pages_keep_their_bits(slot: int) -> None:
    program = reached("stream", *STEPS, "commit")
    given = inputs(program, "commit") | {"slot": torch.tensor([slot])}
    written = run(program, "commit", given)
    assert written.keys() == {f"{part}_pages_{layer}" for part in "kv" for layer in range(2)}
    others = [page for page in range(4) if page != slot]
    for name, pages in written.items():
        assert torch.equal(pages[:, others], given[name][:, others])
        assert not torch.equal(pages[:, slot], given[name][:, slot])


def test_a_tail_left_alive_is_caught() -> None:
    program = reached("stream", *STEPS, "commit")
    alive = replace(program, graphs=program.graphs | {"commit": program.graphs["step"]})
    commit = make_pass("commit", {})
    commit.ensures(program)
    with pytest.raises(AssertionError, match="last block still computes cross-attention's output"):
        commit.ensures(alive)


def test_needs_a_step_over_pages() -> None:
    wanted = "commit: there is no step over pages; put cached_step before it in the recipe"
    assert refused(after, reached("stream", *CANONICAL), "commit") == wanted
    assert refused(after, reached("stream", *CANONICAL, "hoist_text"), "commit") == wanted
