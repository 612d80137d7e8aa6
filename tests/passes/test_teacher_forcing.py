"""teacher_forcing: [clean; noisy] in one forward, each chunk seeing what it may."""

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
from torch import Tensor

from lltk.graph.program import Program
from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu

BEFORE = """
    def forward(hidden_states: latents(f32[1, 4, 12, 1, 1]), timestep: time(f32[1, 12]),
                positions: positions(f64[12])):
        # root
        reshape: f32[1, 12, 1, 4] = aten.reshape.default(hidden_states, [1, 12, 1, 4])
        neg: f32[1, 12] = aten.neg.default(timestep)
        unsqueeze: f32[1, 12, 1] = aten.unsqueeze.default(neg, 2)
        reshape_2: f64[12, 1, 1] = aten.reshape.default(positions, [-1, 1, 1])
        # blocks.0.attn1
        mul: f64[1, 12, 1, 4] = aten.mul.Tensor(reshape, reshape_2)
        permute: f64[1, 1, 12, 4] = aten.permute.default(mul, [0, 2, 1, 3])
        sdpa: f64[1, 1, 12, 4] = \
aten.scaled_dot_product_attention.default(permute, permute, permute)
        permute_1: f64[1, 12, 1, 4] = aten.permute.default(sdpa, [0, 2, 1, 3])
        # root
        flatten: f64[1, 12, 4] = aten.flatten.using_ints(permute_1, 2, 3)
        add: f64[1, 12, 4] = aten.add.Tensor(flatten, unsqueeze)
        reshape_1: f64[1, 12, 2, 2] = aten.reshape.default(add, [1, 12, 2, 2])
        return {'sample': reshape_1}
"""
AFTER = """
def train(noisy: latents(f32[1, 4, 6, 1, 1]), timestep: time(f32[1, 6]), \
positions: positions(f64[6]), \
clean: clean(f32[1, 4, 6, 1, 1])):
    # root
    cat: f32[1, 4, 12, 1, 1] = aten.cat.default([clean, noisy], 2)
    reshape: f32[1, 12, 1, 4] = aten.reshape.default(cat, [1, 12, 1, 4])
    zeros_like: f32[1, 6] = aten.zeros_like.default(timestep)
    cat_1: f32[1, 12] = aten.cat.default([zeros_like, timestep], 1)
    neg: f32[1, 12] = aten.neg.default(cat_1)
    unsqueeze: f32[1, 12, 1] = aten.unsqueeze.default(neg, 2)
    cat_2: f64[12] = aten.cat.default([positions, positions], 0)
    reshape_2: f64[12, 1, 1] = aten.reshape.default(cat_2, [-1, 1, 1])
    # blocks.0.attn1
    mul: f64[1, 12, 1, 4] = aten.mul.Tensor(reshape, reshape_2)
    block_causal_attention: f64[1, 12, 1, 4] = \
lltk.block_causal_attention.default(mul, mul, mul, 2, True)
    # root
    chunk: (f64[1, 6, 1, 4], f64[1, 6, 1, 4],) = aten.chunk.default(block_causal_attention, 2, 1)
    getitem: f64[1, 6, 1, 4] = getitem(chunk, 1)
    flatten: f64[1, 6, 4] = aten.flatten.using_ints(getitem, 2, 3)
    chunk_1: (f32[1, 6, 1], f32[1, 6, 1],) = aten.chunk.default(unsqueeze, 2, 1)
    getitem_1: f32[1, 6, 1] = getitem(chunk_1, 1)
    add: f64[1, 6, 4] = aten.add.Tensor(flatten, getitem_1)
    reshape_1: f64[1, 6, 2, 2] = aten.reshape.default(add, [1, -1, 2, 2])
    return {'sample': reshape_1}
"""
STEPS = (*CANONICAL, "text_per_chunk")
ROWS = [[0], [0, 1], [0, 1, 2], [3], [0, 4], [0, 1, 5]]
"""Chunks that each of three clean and then three noisy chunks sees."""


def made(forward: str) -> Program:
    return hand_made("train", Stage.CANONICAL, {"forward": forward}, height=32, width=32)


def test_rewrites_the_text() -> None:
    assert text(after(made(BEFORE), "teacher_forcing"), "train") == AFTER.strip()


@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int) -> None:
    """The head reads the last block, and what scales and shifts it per frame."""
    program = reached("train", *STEPS, "teacher_forcing", layers=layers)
    assert program.log[-1].matches == {"inputs": 3, "head": 3, "self-attention": layers}
    assert list(program.graphs) == ["train"]
    contract = program.contract("train")
    assert {name: spec.shape for name, spec in contract.inputs.items()} == {
        "noisy": (1, 4, 6, 4, 4),
        "timestep": (1, 6),
        "encoder_hidden_states": (1, 3, 5, 16),
        "positions": (6,),
        "clean": (1, 4, 6, 4, 4),
    }
    assert contract.outputs["sample"].shape == (1, 4, 6, 4, 4)


def joined(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same clip as one long input of the canonical graph."""
    times, where = given["timestep"], given["positions"]
    return {
        "hidden_states": torch.cat([given["clean"], given["noisy"]], dim=2),
        "timestep": torch.cat([torch.zeros_like(times), times], dim=1),
        "positions": torch.cat([where, where]),
        "encoder_hidden_states": given["encoder_hidden_states"],
    }


@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-5), (torch.float64, 1e-13)])
def test_outputs_agree_with_a_masked_graph(dtype: torch.dtype | None, bound: float) -> None:
    before = reached("train", *STEPS)
    program = reached("train", *STEPS, "teacher_forcing")
    given = inputs(program, "train")
    result = run(program, "train", given, dtype)

    def against(rows: list[list[int]], **changes: Tensor) -> float:
        oracle = masked(before, before.spec.self_attention, chunk_mask(rows, 8))
        whole = run(oracle, "forward", joined(given) | changes, dtype)["sample"]
        return difference(result, {"sample": whole[:, :, 6:]})

    assert against(ROWS) < bound
    assert against([*ROWS[:5], [0, 1, 2, 5]]) > 0.01
    assert against([*ROWS[:5], [1, 5]]) > 0.01
    assert against([*ROWS[:1], [0, 1, 2], *ROWS[2:]]) > 0.001
    assert against(ROWS, timestep=given["timestep"].repeat(1, 2)) > 0.01
    assert against(ROWS, positions=torch.arange(12, dtype=torch.float64)) > 0.01


def test_own_clean_chunk_is_invisible() -> None:
    """Noisy chunk i must not see clean chunk i, which it is to predict, nor later ones."""
    program = reached("train", *STEPS, "teacher_forcing")
    given = inputs(program, "train")
    other = given | {"clean": given["clean"].clone()}
    other["clean"][:, :, 2:4] += 1
    first, second = (run(program, "train", x)["sample"] for x in (given, other))
    assert torch.equal(first[:, :, :4], second[:, :, :4])
    assert not torch.equal(first[:, :, 4:], second[:, :, 4:])


@pytest.mark.parametrize("steps", [CANONICAL[:1], CANONICAL[:2], (CANONICAL[0], CANONICAL[2])])
def test_needs_timesteps_and_positions_per_frame(steps: tuple[str, ...]) -> None:
    assert refused(after, reached("train", *steps, layers=1), "teacher_forcing") == (
        "teacher_forcing: needs timesteps and positions per frame; put per_frame_timesteps and "
        "frame_positions before it in the recipe's passes"
    )


def test_attention_that_cannot_be_rewritten_is_refused() -> None:
    elsewhere = BEFORE.replace("permute, permute)", "permute, permute, None, 0.5)")
    wanted = "train: sdpa (blocks.0.attn1) still attends to every frame"
    assert wanted in refused(after, made(elsewhere), "teacher_forcing")
