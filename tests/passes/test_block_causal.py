"""block_causal: a chunk sees itself and what came before."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CANONICAL,
    after,
    chunk_mask,
    difference,
    hand_made,
    inputs,
    masked,
    reached,
    refused,
    run,
    text,
)

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
AFTER = """
def score(q: f32[1, 24, 1, 3], k: f32[1, 24, 1, 3], v: f32[1, 24, 1, 3]):
    # blocks.0.attn1
    block_causal_attention: f32[1, 24, 1, 3] = \
lltk.block_causal_attention.default(q, k, v, 8, False)
    return {'sample': block_causal_attention}
"""
STEPS = (*CANONICAL, "text_per_chunk")


def test_rewrites_the_text() -> None:
    program = after(hand_made("score", Stage.CANONICAL, {"forward": BEFORE}), "block_causal")
    assert text(program, "score") == AFTER.strip()


@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int) -> None:
    program = reached("score", *STEPS, "block_causal", layers=layers)
    assert program.log[-1].matches == {"self-attention": layers}
    assert list(program.graphs) == ["score"]


@pytest.mark.parametrize("sizes", [{}, {"chunk": 1, "window": 3, "sink": 1, "frames": 3}])
@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-5), (torch.float64, 1e-13)])
def test_outputs_agree_with_a_masked_graph(
    sizes: dict[str, int], dtype: torch.dtype | None, bound: float
) -> None:
    before = reached("score", *STEPS, layers=1, **sizes)
    program = reached("score", *STEPS, "block_causal", layers=1, **sizes)
    tokens = program.geometry.chunk * program.geometry.frame_tokens(program.spec)
    given = inputs(program, "score")
    result = run(program, "score", given, dtype)

    def against(*rows: list[int]) -> float:
        oracle = masked(before, before.spec.self_attention, chunk_mask(rows, tokens))
        return difference(result, run(oracle, "forward", given, dtype))

    assert against([0], [0, 1], [0, 1, 2]) < bound
    assert against([0, 1], [0, 1], [0, 1, 2]) > 0.01
    assert against([0], [0, 1], [1, 2]) > 0.01


def test_later_chunks_are_invisible() -> None:
    program = reached("score", *STEPS, "block_causal")
    given = inputs(program, "score")
    other = given | {"hidden_states": given["hidden_states"].clone()}
    other["hidden_states"][:, :, 4:] += 1
    first, second = (run(program, "score", x)["sample"] for x in (given, other))
    assert torch.equal(first[:, :, :4], second[:, :, :4])
    assert not torch.equal(first[:, :, 4:], second[:, :, 4:])


def test_attention_elsewhere_is_named() -> None:
    text_only = BEFORE.replace("attn1", "attn2")
    program = hand_made("score", Stage.CANONICAL, {"forward": text_only})
    assert refused(after, program, "block_causal").startswith(
        "block_causal: matched nothing: sdpa (blocks.0.attn2): is not in blocks.{layer}.attn1"
    )


def test_partly_rewritten_self_attention_is_refused() -> None:
    """One attention that cannot be rewritten would still see the future."""
    twice = BEFORE.replace(
        "        return",
        "        dense: f32[1, 1, 24, 3] = "
        "aten.scaled_dot_product_attention.default(permute, permute_1, permute_2, None, 0.5)\n"
        "        return",
    ).replace("{'sample': permute_3}", "{'sample': permute_3, 'dense': dense}")
    program = hand_made("score", Stage.CANONICAL, {"forward": twice})
    wanted = "score: dense (blocks.0.attn1) still attends to every frame"
    assert wanted in refused(after, program, "block_causal")
