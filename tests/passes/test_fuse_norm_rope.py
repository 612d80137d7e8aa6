"""fuse_norm_rope: the norm of queries and keys and their rotation become one op."""

from __future__ import annotations

import pytest
import torch
from helpers import PASSES, after, difference, hand_made, inputs, reached, refused, run, same, text

from lltk.graph.geometry import Kind
from lltk.graph.program import Program
from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu

BEFORE = """
    def score(x: bf16[2, 4, 16], weight: bf16[16], cos: f32[1, 4, 1, 8], sin: f32[1, 4, 1, 8]):
        # blocks.0.attn1.norm_q
        rms_norm: bf16[2, 4, 16] = aten.rms_norm.default(x, [16], weight, 1e-06)
        # blocks.0.attn1
        heads: bf16[2, 4, 2, 8] = aten.unflatten.int(rms_norm, 2, [2, -1])
        pairs: bf16[2, 4, 2, 4, 2] = aten.unflatten.int(heads, -1, [-1, 2])
        unbind: (bf16[2, 4, 2, 4], bf16[2, 4, 2, 4],) = aten.unbind.int(pairs, -1)
        getitem: bf16[2, 4, 2, 4] = getitem(unbind, 0)
        getitem_1: bf16[2, 4, 2, 4] = getitem(unbind, 1)
        slice_1: f32[1, 4, 1, 4] = aten.slice.Tensor(cos, 3, 0, 9223372036854775807, 2)
        slice_2: f32[1, 4, 1, 4] = aten.slice.Tensor(sin, 3, 1, 9223372036854775807, 2)
        mul: f32[2, 4, 2, 4] = aten.mul.Tensor(getitem, slice_1)
        mul_1: f32[2, 4, 2, 4] = aten.mul.Tensor(getitem_1, slice_2)
        sub: f32[2, 4, 2, 4] = aten.sub.Tensor(mul, mul_1)
        mul_2: f32[2, 4, 2, 4] = aten.mul.Tensor(getitem, slice_2)
        mul_3: f32[2, 4, 2, 4] = aten.mul.Tensor(getitem_1, slice_1)
        add: f32[2, 4, 2, 4] = aten.add.Tensor(mul_2, mul_3)
        stack: f32[2, 4, 2, 4, 2] = aten.stack.default([sub, add], -1)
        flatten: f32[2, 4, 2, 8] = aten.flatten.using_ints(stack, -2)
        to: bf16[2, 4, 2, 8] = aten.to.dtype(flatten, torch.bfloat16)
        return {'sample': to}
"""
AFTER = """
def score(x: bf16[2, 4, 16], weight: bf16[16], cos: f32[1, 4, 1, 8], sin: f32[1, 4, 1, 8]):
    # blocks.0.attn1.norm_q
    rms_norm_rope: bf16[2, 4, 2, 8] = lltk.rms_norm_rope.default(x, weight, cos, sin, 1e-06)
    return {'sample': rms_norm_rope}
"""


def made(score: str = BEFORE) -> Program:
    return hand_made("score", Stage.CAUSAL, {"score": score})


def test_rewrites_the_text() -> None:
    program = after(made(), "fuse_norm_rope")
    assert text(program, "score") == AFTER.strip()
    assert program.log[-1].matches == {"norms and rotations": 1}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sub: f32[2, 4, 2, 4] = aten.sub.Tensor", "sub: f32[2, 4, 2, 4] = aten.add.Tensor"),
        ("aten.mul.Tensor(getitem, slice_2)", "aten.mul.Tensor(getitem, slice_1)"),
        ("aten.mul.Tensor(getitem_1, slice_1)", "aten.mul.Tensor(getitem, slice_1)"),
        ("aten.slice.Tensor(cos, 3, 0,", "aten.slice.Tensor(cos, 3, 1,"),
        ("aten.slice.Tensor(sin, 3, 1,", "aten.slice.Tensor(sin, 3, 0,"),
        ("getitem(unbind, 1)", "getitem(unbind, 0)"),
        ("[16], weight, 1e-06", "[16], None, 1e-06"),
        ("cos: f32[1, 4", "cos: f32[2, 4"),
        ("{'sample': to}", "{'sample': to, 'wide': flatten}"),
        (
            "4, 2] = aten.stack.default([sub, add], -1)",
            "2, 4] = aten.stack.default([sub, add], -2)",
        ),
    ],
)
def test_others_stay(old: str, new: str) -> None:
    assert old in BEFORE
    message = refused(after, made(BEFORE.replace(old, new)), "fuse_norm_rope")
    assert "does not rotate a norm's result by a table of tokens" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "graph", "matches"), [("stream", "step", 7), ("score", "score", 4)]
)
def test_results_stay(kind: Kind, graph: str, matches: int, dtype: str) -> None:
    """Each layer has queries and keys; the commit's last block has keys alone."""
    plain = reached(kind, *PASSES[kind][:-2], dtype=dtype)
    program = after(plain, "fuse_norm_rope")
    assert program.log[-1].matches == {"norms and rotations": matches}
    graph = "step" if kind == "stream" else kind
    given = inputs(plain, graph)
    wanted = run(plain, graph, given)
    assert same(run(program, graph, given), wanted)
    given["positions"] = given["positions"] * 1.5
    assert difference(run(program, graph, given), wanted) > 0.01


def test_double_precision_stays() -> None:
    plain = reached("stream", *PASSES["stream"][:-2])
    given = inputs(plain, "step")
    ours, wanted = (
        run(program, "step", given, torch.float64)
        for program in (after(plain, "fuse_norm_rope"), plain)
    )
    assert same(ours, wanted)
