"""canonicalise drops what capture leaves behind, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import after, captured, hand_made, inputs, reached, refused, run, same, text

from lltk.graph.edit import calls
from lltk.graph.geometry import Kind
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.graph.text import parse

pytestmark = pytest.mark.cpu
aten = torch.ops.aten

CAPTURED = """
    def forward(x: f32[1, 4, 2, 6], y: bf16[1]):
        # blocks.0
        _assert: None = aten._assert_tensor_metadata.default(x, None, None, torch.float32)
        to: f32[1, 4, 2, 6] = aten.to.dtype(x, torch.float32)
        dropout: f32[1, 4, 2, 6] = aten.dropout.default(to, 0.0, False)
        contiguous: f32[1, 4, 2, 6] = aten.contiguous.default(dropout)
        # blocks.0.attn1
        empty_like: f32[1, 4, 2, 6] = aten.empty_like.default(contiguous)
        slice_1: f32[1, 4, 2, 3] = aten.slice.Tensor(contiguous, 3, 0, 9223372036854775807, 2)
        slice_2: f32[1, 4, 2, 3] = aten.slice.Tensor(contiguous, 3, 1, 9223372036854775807, 2)
        neg: f32[1, 4, 2, 3] = aten.neg.default(slice_2)
        slice_3: f32[1, 4, 2, 3] = aten.slice.Tensor(empty_like, 3, 0, 9223372036854775807, 2)
        copy_: f32[1, 4, 2, 3] = aten.copy_.default(slice_3, neg)
        slice_4: f32[1, 4, 2, 3] = aten.slice.Tensor(empty_like, 3, 1, 9223372036854775807, 2)
        copy__1: f32[1, 4, 2, 3] = aten.copy_.default(slice_4, slice_1)
        type_as: bf16[1, 4, 2, 6] = aten.type_as.default(empty_like, y)
        # root
        arange: i64[6] = aten.arange.default(6, device='cpu', pin_memory=False)
        exp: f32[6] = aten.exp.default(arange)
        mul: f32[1, 4, 2, 6] = aten.mul.Tensor(type_as, exp)
        return {'sample': mul}
"""
CANONICAL = """
def forward(x: f32[1, 4, 2, 6], y: bf16[1]):
    # blocks.0.attn1
    slice_1: f32[1, 4, 2, 3] = aten.slice.Tensor(x, 3, 0, 9223372036854775807, 2)
    slice_2: f32[1, 4, 2, 3] = aten.slice.Tensor(x, 3, 1, 9223372036854775807, 2)
    neg: f32[1, 4, 2, 3] = aten.neg.default(slice_2)
    stack: f32[1, 4, 2, 3, 2] = aten.stack.default([neg, slice_1], -1)
    flatten: f32[1, 4, 2, 6] = aten.flatten.using_ints(stack, -2)
    to_1: bf16[1, 4, 2, 6] = aten.to.dtype(flatten, torch.bfloat16)
    # root
    mul: f32[1, 4, 2, 6] = aten.mul.Tensor(to_1, self['exp'])
    return {'sample': mul}
"""


def made(captured_text: str) -> Program:
    return hand_made("score", Stage.CAPTURED, {"forward": captured_text})


def test_rewrites_the_text() -> None:
    program = after(made(CAPTURED), "canonicalise")
    assert text(program, "forward") == CANONICAL.strip()
    assert torch.equal(program.constants["exp"], torch.arange(6).exp())
    assert program.log[-1].matches == {
        "checks": 1,
        "casts": 2,
        "dropout": 1,
        "copies": 1,
        "rope": 1,
        "constants": 1,
    }


def test_hand_made_result_keeps_its_bits() -> None:
    before = made(CAPTURED)
    given = inputs(before, "forward")
    result = run(before, "forward", given)
    assert same(run(after(before, "canonicalise"), "forward", given), result)
    swapped = CANONICAL.replace("[neg, slice_1]", "[slice_1, neg]")
    wrong = after(before, "canonicalise")
    wrong.graphs["forward"] = parse(swapped.strip(), wrong.constants)
    assert not same(run(wrong, "forward", given), result)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["train", "score", "stream"])
def test_matches_follow_from_the_layers(kind: Kind, layers: int) -> None:
    """A layer holds 24 casts, 3 dropouts and RoPE of q and k; the frequencies are one constant."""
    log = reached(kind, "canonicalise", layers=layers).log
    assert log[-1].matches == {
        "casts": 9 + 24 * layers,
        "dropout": 3 * layers,
        "rope": 2 * layers,
        "constants": 1,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_keep_their_bits(dtype: str) -> None:
    before = captured("stream", layers=1, dtype=dtype)
    program = reached("stream", "canonicalise", layers=1, dtype=dtype)
    given = inputs(before, "forward")
    result = run(before, "forward", given)
    assert same(run(program, "forward", given), result)
    wrong = after(program)
    (node, *_) = calls(wrong.graphs["forward"], aten.stack.default)
    node.args = (list(reversed(node.args[0])), -1)
    assert not same(run(wrong, "forward", given), result)


def test_active_dropout_stays_and_is_named() -> None:
    active = """
    def forward(x: f32[4]):
        # blocks.0.attn1
        dropout: f32[4] = aten.dropout.default(x, 0.5, True)
        return {'sample': dropout}
    """
    assert refused(after, made(active), "canonicalise") == (
        "canonicalise: matched nothing: dropout (blocks.0.attn1): dropout with p=0.5 is active. "
        "Remove it from the recipe's passes, or run it where its pattern still stands"
    )


def test_half_filled_buffer_stays_and_is_refused() -> None:
    """A buffer of which only one half is written is no RoPE. The verifier finds the mutation."""
    half = "\n".join(line for line in CAPTURED.splitlines() if "copy__1" not in line)
    wanted = "forward: copy_ (blocks.0.attn1) is a mutation; a canonical graph has none"
    assert wanted in refused(after, made(half), "canonicalise")


def test_graph_without_a_candidate_is_refused() -> None:
    plain = """
    def forward(x: f32[4]):
        # blocks.0
        neg: f32[4] = aten.neg.default(x)
        return {'sample': neg}
    """
    message = refused(after, made(plain), "canonicalise")
    assert message.startswith("canonicalise: matched nothing: the graphs hold no candidate for it")
