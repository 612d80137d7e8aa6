"""frame_positions: tables with diffusers' bits on whole positions, and right ones elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from helpers import (
    CANONICAL,
    after,
    difference,
    hand_made,
    inputs,
    reached,
    refused,
    run,
    same,
    text,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lltk.graph.geometry import Kind
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.models.wan22 import rope_split
from lltk.ops.rope_table.op import rope_table

pytestmark = pytest.mark.cpu

BEFORE = """
    def forward(hidden_states: latents(f32[1, 4, 3, 4, 4])):
        # rope
        slice_1: f32[3, 12] = aten.slice.Tensor(self['rope.freqs_cos'], 0, 0, 3)
        slice_2: f32[3, 12] = aten.slice.Tensor(self['rope.freqs_sin'], 0, 0, 3)
        repeat: f32[12, 12] = aten.repeat_interleave.self_int(slice_1, 4, 0)
        repeat_1: f32[12, 12] = aten.repeat_interleave.self_int(slice_2, 4, 0)
        reshape: f32[1, 12, 1, 12] = aten.reshape.default(repeat, [1, 12, 1, 12])
        reshape_1: f32[1, 12, 1, 12] = aten.reshape.default(repeat_1, [1, 12, 1, 12])
        # blocks.0.attn1
        mul: f32[1, 12, 1, 12] = aten.mul.Tensor(reshape, reshape_1)
        return {'sample': mul}
"""
AFTER = """
def forward(hidden_states: latents(f32[1, 4, 3, 4, 4]), positions: positions(f64[3])):
    # rope
    rope_table: (f32[1, 12, 1, 12], f32[1, 12, 1, 12],) = \
lltk.rope_table.default(positions, 2, 2, [4, 4, 4], 10000.0)
    rope_cos: f32[1, 12, 1, 12] = getitem(rope_table, 0)
    rope_sin: f32[1, 12, 1, 12] = getitem(rope_table, 1)
    # blocks.0.attn1
    mul: f32[1, 12, 1, 12] = aten.mul.Tensor(rope_cos, rope_sin)
    return {'sample': mul}
"""
TABLES = {name: torch.zeros(1024, 12) for name in ("rope.freqs_cos", "rope.freqs_sin")}


def made(forward: str) -> Program:
    return hand_made("score", Stage.CANONICAL, {"forward": forward}, constants=TABLES)


def test_rewrites_the_text() -> None:
    program = after(made(BEFORE), "frame_positions")
    assert text(program, "forward") == AFTER.strip()
    assert not program.constants


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["train", "score", "stream"])
def test_matches_are_two_tables_however_many_layers(kind: Kind, layers: int) -> None:
    program = reached(kind, *CANONICAL, layers=layers)
    assert program.log[-1].matches == {"tables": 2}
    frames = program.geometry.captured_frames(kind)
    assert program.contract("forward").inputs["positions"].shape == (frames,)


def test_outputs_keep_their_bits() -> None:
    """RoPE is relative, so shifting all positions alike shows nowhere. Shifting one frame does."""
    before, program = (reached("score", *CANONICAL[:end], width=96) for end in (2, 3))
    values = inputs(program, "forward")
    positions = values.pop("positions")
    wanted = run(before, "forward", values)

    def at(where: Tensor) -> dict[str, Tensor]:
        return run(program, "forward", values | {"positions": where})

    assert same(at(positions), wanted)
    assert difference(at(positions + 100), wanted) < 1e-5
    assert difference(at(positions + torch.tensor([0, 0, 0, 0, 0, 1])), wanted) > 1e-3


# Tables


def diffusers_table(frames: int, height: int, width: int, head_dim: int) -> tuple[Tensor, ...]:
    rope = WanRotaryPosEmbed(head_dim, (1, 1, 1), 1024)
    return rope(torch.empty(1, 1, frames, height, width))


@pytest.mark.parametrize("head_dim", [12, 32, 40, 128])
def test_tables_have_diffusers_bits_on_all_its_positions(head_dim: int) -> None:
    ours = rope_table(torch.arange(1024, dtype=torch.float64), 3, 2, rope_split(head_dim), 10000.0)
    theirs = diffusers_table(1024, 3, 2, head_dim)
    for mine, his in zip(ours, theirs, strict=True):
        assert mine.shape == (1, 1024 * 6, 1, head_dim) and torch.equal(mine, his)
    shifted = rope_table(
        torch.arange(1, 1025, dtype=torch.float64), 3, 2, rope_split(head_dim), 10000.0
    )
    assert not torch.equal(shifted[0], theirs[0])


@given(st.lists(st.integers(0, 1023), min_size=1, max_size=5))
def test_each_frame_has_the_row_of_its_position(where: list[int]) -> None:
    """Frames may be in any order, repeated or far apart. Each reads its own absolute position."""
    ours = rope_table(torch.tensor(where, dtype=torch.float64), 2, 2, (4, 4, 4), 10000.0)
    for mine, his in zip(ours, diffusers_table(1024, 2, 2, 12), strict=True):
        rows = his.unflatten(1, (1024, 4))[:, where].flatten(1, 2)
        assert torch.equal(mine, rows)


@given(st.floats(-1e9, 1e9))
def test_fractional_and_huge_positions(position: float) -> None:
    """Python's own cosine agrees: fractions count, and videos outlast diffusers' 1024 rows."""
    head_dim = 12
    cos, sin = rope_table(torch.tensor([position], dtype=torch.float64), 1, 1, (4, 4, 4), 10000.0)
    pairs = (head_dim - 4 * (head_dim // 6)) // 2
    for pair in range(pairs):
        angle = position * 10000.0 ** (-pair / pairs)
        for twin in (2 * pair, 2 * pair + 1):
            assert cos[0, 0, 0, twin] == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[0, 0, 0, twin] == pytest.approx(math.sin(angle), abs=1e-6)
    assert torch.equal(cos[..., 2 * pairs :], torch.ones(1, 1, 1, head_dim - 2 * pairs))


def test_half_a_frame_is_a_position_of_its_own() -> None:
    positions = torch.tensor([7.0, 7.5, 8.0], dtype=torch.float64)
    cos, _ = rope_table(positions, 1, 1, (4, 4, 4), 10000.0)
    low, half, high = cos[0, :, 0, 0].tolist()
    assert half == pytest.approx(math.cos(7.5), abs=1e-7)
    assert len({low, half, high}) == 3


# Refusals


def test_table_read_in_parts_is_named() -> None:
    """Two values leave the rope module, so neither is its table."""
    parts = BEFORE.replace(
        "        # blocks.0.attn1\n",
        "        # blocks.0.attn1\n        neg: f32[12, 12] = aten.neg.default(repeat)\n",
    ).replace("{'sample': mul}", "{'sample': mul, 'neg': neg}")
    assert refused(after, made(parts), "frame_positions").startswith(
        "frame_positions: matched nothing: repeat (rope): 2 values of rope derive from "
        "rope.freqs_cos, not one; reshape (rope): 2 values of rope"
    )


def test_graph_without_tables_is_refused() -> None:
    bare = """
    def forward(hidden_states: latents(f32[1, 4, 3, 4, 4])):
        # blocks.0
        neg: f32[1, 4, 3, 4, 4] = aten.neg.default(hidden_states)
        return {'sample': neg}
    """
    assert refused(after, made(bare), "frame_positions").startswith(
        "frame_positions: matched nothing: hidden_states (root): 0 values of rope derive from "
        "rope.freqs_cos, not one"
    )
