"""text_per_chunk: a chunk's tokens read their own prompt, and only that."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CANONICAL,
    after,
    difference,
    hand_made,
    inputs,
    masked,
    reached,
    refused,
    run,
    text,
)

from lltk.graph.geometry import Kind
from lltk.graph.program import Program
from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu

BEFORE = """
    def forward(hidden_states: latents(f32[1, 4, {frames}, 2, 2]),
                encoder_hidden_states: text(f32[1, 5, 3]),
                q: f32[1, {frames}, 1, 3]):
        # blocks.0.attn2
        k: f32[1, 5, 1, 3] = aten.unsqueeze.default(encoder_hidden_states, 2)
        permute: f32[1, 1, {frames}, 3] = aten.permute.default(q, [0, 2, 1, 3])
        permute_1: f32[1, 1, 5, 3] = aten.permute.default(k, [0, 2, 1, 3])
        permute_2: f32[1, 1, 5, 3] = aten.permute.default(k, [0, 2, 1, 3])
        sdpa: f32[1, 1, {frames}, 3] = \
aten.scaled_dot_product_attention.default(permute, permute_1, permute_2)
        permute_3: f32[1, {frames}, 1, 3] = aten.permute.default(sdpa, [0, 2, 1, 3])
        return {{'sample': permute_3}}
"""
SCORE = """
def forward(hidden_states: latents(f32[1, 4, 6, 2, 2]), \
encoder_hidden_states: text(f32[1, 3, 5, 3]), \
q: f32[1, 6, 1, 3]):
    # root
    flatten_2: f32[3, 5, 3] = aten.flatten.using_ints(encoder_hidden_states, 0, 1)
    # blocks.0.attn2
    k: f32[3, 5, 1, 3] = aten.unsqueeze.default(flatten_2, 2)
    unflatten: f32[1, 3, 2, 1, 3] = aten.unflatten.int(q, 1, [-1, 2])
    flatten: f32[3, 2, 1, 3] = aten.flatten.using_ints(unflatten, 0, 1)
    permute_4: f32[3, 1, 2, 3] = aten.permute.default(flatten, [0, 2, 1, 3])
    permute_5: f32[3, 1, 5, 3] = aten.permute.default(k, [0, 2, 1, 3])
    permute_6: f32[3, 1, 5, 3] = aten.permute.default(k, [0, 2, 1, 3])
    scaled_dot_product_attention: f32[3, 1, 2, 3] = \
aten.scaled_dot_product_attention.default(permute_4, permute_5, permute_6)
    permute_7: f32[3, 2, 1, 3] = aten.permute.default(scaled_dot_product_attention, [0, 2, 1, 3])
    unflatten_1: f32[1, 3, 2, 1, 3] = aten.unflatten.int(permute_7, 0, [1, -1])
    flatten_1: f32[1, 6, 1, 3] = aten.flatten.using_ints(unflatten_1, 1, 2)
    return {'sample': flatten_1}
"""
TRAIN_KEYS = """
    unflatten_1: f32[1, 1, 3, 5, 1, 3] = aten.unflatten.int(k, 0, [1, 1, -1])
    expand: f32[1, 2, 3, 5, 1, 3] = aten.expand.default(unflatten_1, [-1, 2, -1, -1, -1, -1])
    flatten_1: f32[6, 5, 1, 3] = aten.flatten.using_ints(expand, 0, 2)
"""


def made(kind: Kind, forward: str = BEFORE) -> Program:
    frames = {"score": 6, "train": 12}[kind]
    texts = {"forward": forward.format(frames=frames)}
    return hand_made(kind, Stage.CANONICAL, texts, height=32, width=32)


def test_rewrites_the_text() -> None:
    assert text(after(made("score"), "text_per_chunk"), "forward") == SCORE.strip()


def test_both_copies_of_a_train_clip_read_the_same_prompts() -> None:
    assert TRAIN_KEYS.strip("\n") in text(after(made("train"), "text_per_chunk"), "forward")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["train", "score", "reference"])
def test_matches_follow_from_the_layers(kind: Kind, layers: int) -> None:
    program = reached(kind, *CANONICAL, "text_per_chunk", layers=layers)
    assert program.log[-1].matches == {"cross-attention": layers}
    assert program.contract("forward").inputs["encoder_hidden_states"].shape == (1, 3, 5, 16)


@pytest.mark.parametrize(("kind", "batch"), [("score", 1), ("train", 2), ("reference", 1)])
@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-5), (torch.float64, 1e-13)])
def test_outputs_agree_with_masked_prompts(
    kind: Kind, batch: int, dtype: torch.dtype | None, bound: float
) -> None:
    """Compared with one long text of all prompts, masked so that a chunk sees only its own."""
    program = reached(kind, *CANONICAL, "text_per_chunk", layers=1, batch=batch)
    prompts, tokens = program.geometry.chunks, program.geometry.text_tokens
    chunks = program.geometry.captured_frames(kind) // program.geometry.chunk
    chunk_tokens = program.geometry.chunk * program.geometry.frame_tokens(program.spec)
    allowed = torch.tensor([[c % prompts == p for p in range(prompts)] for c in range(chunks)])
    allowed = allowed.repeat_interleave(chunk_tokens, 0).repeat_interleave(tokens, 1)
    long = reached(kind, *CANONICAL, layers=1, batch=batch, text_tokens=prompts * tokens)
    oracle = masked(long, long.spec.cross_attention, allowed)

    given = inputs(program, "forward")
    prompt = given["encoder_hidden_states"]
    wanted = run(oracle, "forward", given | {"encoder_hidden_states": prompt.flatten(1, 2)}, dtype)
    assert difference(run(program, "forward", given, dtype), wanted) < bound
    swapped = given | {"encoder_hidden_states": prompt[:, [1, 0, 2]]}
    assert difference(run(program, "forward", swapped, dtype), wanted) > 0.1


def test_equal_prompts_agree_with_one_prompt() -> None:
    before = reached("score", *CANONICAL)
    program = reached("score", *CANONICAL, "text_per_chunk")
    given = inputs(before, "forward")
    repeated = given["encoder_hidden_states"][:, None].expand(-1, 3, -1, -1)
    result = run(program, "forward", given | {"encoder_hidden_states": repeated})
    assert difference(result, run(before, "forward", given)) < 1e-5


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("blocks.0.attn2", "blocks.0.attn1", "sdpa (blocks.0.attn1): is not in blocks.{layer}"),
        ("permute_2)", "permute_2, scale=2.0)", "sdpa (blocks.0.attn2): has a mask, dropout or"),
        (
            "aten.permute.default(sdpa, [0, 2, 1, 3])",
            "aten.permute.default(sdpa, [1, 2, 0, 3])",
            "sdpa (blocks.0.attn2): its operands are not permuted by [0, 2, 1, 3]",
        ),
    ],
)
def test_attention_that_does_not_fit_is_named(old: str, new: str, reason: str) -> None:
    assert old in BEFORE
    message = refused(after, made("score", BEFORE.replace(old, new)), "text_per_chunk")
    assert message.startswith(f"text_per_chunk: matched nothing: {reason}")
