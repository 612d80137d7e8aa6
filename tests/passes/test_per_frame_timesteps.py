"""per_frame_timesteps holds modulations per frame and computes what per-token ones do."""

from __future__ import annotations

from math import prod

import pytest
import torch
from helpers import after, difference, hand_made, inputs, reached, refused, run, text
from torch import Tensor, fx

from lltk.graph.contract import Role, TensorSpec
from lltk.graph.edit import input_of, shape
from lltk.graph.geometry import Kind
from lltk.graph.program import Program
from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu

BEFORE = """
    def forward(hidden_states: latents(f32[1, 8, 3]), timestep: time(f32[1, 8])):
        # root
        flatten: f32[8] = aten.flatten.using_ints(timestep)
        exp: f32[8] = aten.exp.default(flatten)
        unflatten: f32[1, 8] = aten.unflatten.int(exp, 0, [-1, 8])
        # blocks.0
        unsqueeze: f32[1, 8, 1] = aten.unsqueeze.default(unflatten, 2)
        mul: f32[1, 8, 3] = aten.mul.Tensor(hidden_states, unsqueeze)
        add: f32[1, 8, 3] = aten.add.Tensor(mul, unsqueeze)
        return {'sample': add}
"""
AFTER = """
def forward(hidden_states: latents(f32[1, 8, 3]), timestep: time(f32[1, 2])):
    # root
    flatten: f32[2] = aten.flatten.using_ints(timestep)
    exp: f32[2] = aten.exp.default(flatten)
    modulation: f32[1, 2] = aten.unflatten.int(exp, 0, [1, -1])
    # blocks.0
    unsqueeze: f32[1, 2, 1] = aten.unsqueeze.default(modulation, 2)
    unflatten_1: f32[1, 2, 4, 3] = aten.unflatten.int(hidden_states, 1, [-1, 4])
    unsqueeze_1: f32[1, 2, 1, 1] = aten.unsqueeze.default(unsqueeze, 2)
    mul_1: f32[1, 2, 4, 3] = aten.mul.Tensor(unflatten_1, unsqueeze_1)
    unsqueeze_2: f32[1, 2, 1, 1] = aten.unsqueeze.default(unsqueeze, 2)
    add_1: f32[1, 2, 4, 3] = aten.add.Tensor(mul_1, unsqueeze_2)
    flatten_2: f32[1, 8, 3] = aten.flatten.using_ints(add_1, 1, 2)
    return {'sample': flatten_2}
"""


def made(forward: str) -> Program:
    return hand_made("score", Stage.CANONICAL, {"forward": forward})


def test_rewrites_the_text() -> None:
    program = after(made(BEFORE), "per_frame_timesteps")
    assert text(program, "forward") == AFTER.strip()
    assert program.contract("forward").inputs["timestep"] == TensorSpec((1, 2), torch.float32)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["train", "score", "stream"])
def test_matches_follow_from_the_layers(kind: Kind, layers: int) -> None:
    """A layer scales and shifts twice and has two gates; the head scales and shifts once."""
    log = reached(kind, "canonicalise", "per_frame_timesteps", layers=layers).log
    assert log[-1].matches == {"modulations": 6 * layers + 2}


def time_only(program: Program) -> list[fx.Node]:
    """The calls that depend on the timestep and on no latents: embedding and modulations."""
    graph = program.graphs["forward"]
    tainted = {role: {input_of(graph, role)} for role in (Role.TIME, Role.LATENTS)}
    for node in graph.nodes:
        for reached_nodes in tainted.values():
            if reached_nodes & set(node.all_input_nodes):
                reached_nodes.add(node)
    time, latents = tainted.values()
    return [node for node in graph.nodes if node in time - latents and node.op == "call_function"]


def test_no_modulation_is_held_per_token() -> None:
    before = reached("score", "canonicalise")
    program = reached("score", "canonicalise", "per_frame_timesteps")
    frames = program.geometry.frames
    tokens = frames * program.geometry.frame_tokens(program.spec)
    width = program.spec.heads * program.spec.head_dim

    def sizes(of: Program) -> list[int]:
        single = [node for node in time_only(of) if isinstance(node.meta["val"], Tensor)]
        return [prod(shape(node)) for node in single]

    assert max(sizes(program)) == frames * 6 * width
    assert max(sizes(before)) == tokens * 6 * width


@pytest.mark.parametrize(
    "sizes", [{}, {"batch": 2}, {"height": 32, "width": 32}], ids=["plain", "batch", "token"]
)
@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-6), (torch.float64, 1e-14)])
def test_outputs_agree_with_timesteps_per_token(
    sizes: dict[str, int], dtype: torch.dtype | None, bound: float
) -> None:
    """With one token a frame, six frames are as many tokens as a block has modulations."""
    before = reached("score", "canonicalise", layers=1, **sizes)
    program = reached("score", "canonicalise", "per_frame_timesteps", layers=1, **sizes)
    given = inputs(program, "forward")
    times = given["timestep"]
    per_token = times.repeat_interleave(program.geometry.frame_tokens(program.spec), dim=1)
    wanted = run(before, "forward", given | {"timestep": per_token}, dtype)
    assert difference(run(program, "forward", given, dtype), wanted) < bound
    swapped = given | {"timestep": times.flip(1)}
    assert difference(run(program, "forward", swapped, dtype), wanted) > 0.1


def test_mixing_tokens_and_timesteps_otherwise_is_named() -> None:
    mixed = BEFORE.replace("aten.mul.Tensor", "aten.sub.Tensor").replace("aten.add", "aten.sub")
    assert refused(after, made(mixed), "per_frame_timesteps").startswith(
        "per_frame_timesteps: matched nothing: mul (blocks.0): aten.sub.Tensor mixes tokens and "
        "timesteps"
    )


def test_other_timesteps_are_refused() -> None:
    per_frame = BEFORE.replace("time(f32[1, 8])", "time(f32[1, 6])")
    assert refused(after, made(per_frame), "per_frame_timesteps") == (
        "per_frame_timesteps: forward: timestep is [1, 6], not [batch, frames * 4 tokens]; "
        "capture with one timestep a token"
    )
