"""hoist_text: the prologue and the step together are the forward, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import CANONICAL, after, hand_made, inputs, reached, refused, run, same, texts

from lltk.graph.program import Program
from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu

BEFORE = """
    def forward(hidden_states: latents(f32[1, 4, 1, 3]), encoder_hidden_states: text(f32[1, 5, 3])):
        # text
        gelu: f32[1, 5, 3] = aten.gelu.default(encoder_hidden_states)
        # blocks.0.attn2
        linear: f32[1, 5, 3] = aten.linear.default(gelu, self['blocks.0.attn2.to_k.weight'])
        k: f32[1, 5, 1, 3] = aten.unsqueeze.default(linear, 2)
        v: f32[1, 5, 1, 3] = aten.unsqueeze.default(gelu, 2)
        permute: f32[1, 1, 4, 3] = aten.permute.default(hidden_states, [0, 2, 1, 3])
        permute_1: f32[1, 1, 5, 3] = aten.permute.default(k, [0, 2, 1, 3])
        permute_2: f32[1, 1, 5, 3] = aten.permute.default(v, [0, 2, 1, 3])
        sdpa: f32[1, 1, 4, 3] = \
aten.scaled_dot_product_attention.default(permute, permute_1, permute_2)
        permute_3: f32[1, 4, 1, 3] = aten.permute.default(sdpa, [0, 2, 1, 3])
        return {'sample': permute_3}
"""
PROLOGUE = """
def prologue(encoder_hidden_states: text(f32[1, 5, 3])):
    # text
    gelu: f32[1, 5, 3] = aten.gelu.default(encoder_hidden_states)
    # blocks.0.attn2
    linear: f32[1, 5, 3] = aten.linear.default(gelu, self['blocks.0.attn2.to_k.weight'])
    k: f32[1, 5, 1, 3] = aten.unsqueeze.default(linear, 2)
    v: f32[1, 5, 1, 3] = aten.unsqueeze.default(gelu, 2)
    return {'cross_k_0': k, 'cross_v_0': v}
"""
STEP = """
def step(hidden_states: latents(f32[1, 4, 1, 3]), cross_k_0: prompt(f32[1, 5, 1, 3]), \
cross_v_0: prompt(f32[1, 5, 1, 3])):
    # blocks.0.attn2
    permute: f32[1, 1, 4, 3] = aten.permute.default(hidden_states, [0, 2, 1, 3])
    permute_1: f32[1, 1, 5, 3] = aten.permute.default(cross_k_0, [0, 2, 1, 3])
    permute_2: f32[1, 1, 5, 3] = aten.permute.default(cross_v_0, [0, 2, 1, 3])
    sdpa: f32[1, 1, 4, 3] = \
aten.scaled_dot_product_attention.default(permute, permute_1, permute_2)
    permute_3: f32[1, 4, 1, 3] = aten.permute.default(sdpa, [0, 2, 1, 3])
    return {'sample': permute_3}
"""
STEPS = (*CANONICAL, "hoist_text")


def made(forward: str) -> Program:
    weights = {"blocks.0.attn2.to_k.weight": torch.randn(3, 3)}
    return hand_made("stream", Stage.CANONICAL, {"forward": forward}, weights)


def test_rewrites_the_text() -> None:
    program = after(made(BEFORE), "hoist_text")
    assert texts(program) == {"prologue": PROLOGUE.lstrip(), "step": STEP.lstrip()}


@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int) -> None:
    program = reached("stream", *STEPS, layers=layers)
    assert program.log[-1].matches == {"cross-attention": layers}
    names = [f"cross_{part}_{layer}" for layer in range(layers) for part in "kv"]
    prologue, step = program.contract("prologue"), program.contract("step")
    assert list(prologue.inputs) == ["encoder_hidden_states"]
    assert list(prologue.outputs) == names
    assert list(step.inputs) == ["hidden_states", "timestep", "positions", *names]
    assert {name: step.inputs[name] for name in names} == prologue.outputs


def test_prologue_and_step_share_no_parameter() -> None:
    """The text's work is done once a prompt: the step reads none of its weights."""
    program = reached("stream", *STEPS)
    prologue, step = (
        {node.target for node in program.graphs[name].find_nodes(op="get_attr")}
        for name in ("prologue", "step")
    )
    text = {
        f"blocks.{layer}.attn2.{name}"
        for layer in range(2)
        for name in ("to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias", "norm_k.weight")
    } | {
        f"condition_embedder.text_embedder.linear_{i}.{kind}"
        for i in (1, 2)
        for kind in ("weight", "bias")
    }
    assert prologue == text
    assert prologue | step == program.weights.keys() | program.constants.keys()
    assert not prologue & step


@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_keep_their_bits(batch: int) -> None:
    before = reached("stream", *CANONICAL, layers=1, batch=batch)
    program = reached("stream", *STEPS, layers=1, batch=batch)
    given = inputs(before, "forward")
    wanted = run(before, "forward", given)
    prompt = given.pop("encoder_hidden_states")

    def both(text: torch.Tensor) -> dict[str, torch.Tensor]:
        cross = run(program, "prologue", {"encoder_hidden_states": text})
        return run(program, "step", given | cross)

    assert same(both(prompt), wanted)
    assert not same(both(prompt * 1.01), wanted)


def test_text_read_elsewhere_is_refused() -> None:
    elsewhere = BEFORE.replace("'sample': permute_3", "'sample': permute_3, 'text': gelu")
    assert refused(after, made(elsewhere), "hoist_text").startswith(
        "hoist_text: the step still reads the text outside cross-attention"
    )


def test_graph_without_cross_attention_says_what_it_has() -> None:
    message = refused(after, made(BEFORE.replace("attn2\n", "attn1\n")), "hoist_text")
    assert message.startswith("hoist_text: ")
    assert "sdpa (blocks.0.attn1): is not in blocks.{layer}.attn2" in message
