"""bidirectional: every frame goes on seeing every frame."""

from __future__ import annotations

import pytest
import torch
from helpers import CANONICAL, after, hand_made, inputs, reached, refused, run, same, text

from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu

BEFORE = """
    def forward(q: f32[1, 24, 1, 3], k: f32[1, 24, 1, 3], v: f32[1, 24, 1, 3]):
        # blocks.0.attn1
        permute: f32[1, 1, 24, 3] = aten.permute.default(q, [0, 2, 1, 3])
        permute_1: f32[1, 1, 24, 3] = aten.permute.default(k, [0, 2, 1, 3])
        permute_2: f32[1, 1, 24, 3] = aten.permute.default(v, [0, 2, 1, 3])
        sdpa: f32[1, 1, 24, 3] = \
aten.scaled_dot_product_attention.default(permute, permute_1, permute_2)
        permute_3: f32[1, 24, 1, 3] = aten.permute.default(sdpa, [0, 2, 1, 3])
        return {'sample': permute_3}
"""
STEPS = (*CANONICAL, "text_per_chunk")


def test_renames_the_graph_and_leaves_its_body() -> None:
    before = hand_made("reference", Stage.CANONICAL, {"forward": BEFORE})
    wanted = text(before, "forward").replace("def forward(", "def reference(")
    program = after(before, "bidirectional")
    assert text(program, "reference") == wanted
    assert list(program.graphs) == ["reference"]


@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int) -> None:
    program = reached("reference", *STEPS, "bidirectional", layers=layers)
    assert program.log[-1].matches == {"self-attention": layers}


def test_outputs_are_the_models_own() -> None:
    before, program = reached("reference", *STEPS), reached("reference", *STEPS, "bidirectional")
    given = inputs(program, "reference")
    result = run(program, "reference", given)
    assert same(result, run(before, "forward", given))
    causal = reached("score", *STEPS, "block_causal")
    assert not same(result, run(causal, "score", given))


def test_later_frames_are_visible() -> None:
    program = reached("reference", *STEPS, "bidirectional")
    given = inputs(program, "reference")
    other = given | {"hidden_states": given["hidden_states"].clone()}
    other["hidden_states"][:, :, 4:] += 1
    first, second = (run(program, "reference", x)["sample"] for x in (given, other))
    assert not torch.equal(first[:, :, :4], second[:, :, :4])


def test_attention_elsewhere_is_named() -> None:
    program = hand_made("reference", Stage.CANONICAL, {"forward": BEFORE.replace("attn1", "attn2")})
    assert refused(after, program, "bidirectional").startswith(
        "bidirectional: matched nothing: sdpa (blocks.0.attn2): is not in blocks.{layer}.attn1"
    )
