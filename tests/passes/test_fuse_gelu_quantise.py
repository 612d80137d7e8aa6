"""fuse_gelu_quantise: a GELU and what quantises it become one op."""

from __future__ import annotations

import pytest
from helpers import after, hand_made, inputs, reached, refused, run, same, text

from lltk.graph.program import Program
from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu

BEFORE = """
    def score(hidden_states: bf16[1, 4, 16]):
        # blocks.0.ffn.net.0
        gelu: bf16[1, 4, 16] = aten.gelu.default(hidden_states, approximate='tanh')
        # blocks.0.ffn.net.2
        fp8_quantise: (f8e4m3[1, 4, 16], f32[1, 4, 1],) = lltk.fp8_quantise.default(gelu)
        getitem: f8e4m3[1, 4, 16] = getitem(fp8_quantise, 0)
        return {'sample': getitem}
"""
AFTER = """
def score(hidden_states: bf16[1, 4, 16]):
    # blocks.0.ffn.net.0
    fp8_quantise_gelu: (f8e4m3[1, 4, 16], f32[1, 4, 1],) = \
lltk.fp8_quantise_gelu.default(hidden_states)
    # blocks.0.ffn.net.2
    getitem: f8e4m3[1, 4, 16] = getitem(fp8_quantise_gelu, 0)
    return {'sample': getitem}
"""
STEPS = ("canonicalise", "per_frame_timesteps", "frame_positions", "hoist_text", "cached_step")


def made(score: str = BEFORE) -> Program:
    return hand_made("score", Stage.QUANTISED, {"score": score})


def test_rewrites_the_text() -> None:
    program = after(made(), "fuse_gelu_quantise")
    assert text(program, "score") == AFTER.strip()
    assert program.log[-1].matches == {"GELUs": 1}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{'sample': getitem}", "{'sample': getitem, 'more': gelu}"),
        (", approximate='tanh'", ""),
        ("gelu.default(hidden_states, approximate='tanh')", "silu.default(hidden_states)"),
    ],
)
def test_others_stay(old: str, new: str) -> None:
    assert old in BEFORE
    message = refused(after, made(BEFORE.replace(old, new)), "fuse_gelu_quantise")
    assert "quantises no GELU by tanh that it alone reads" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_stay(dtype: str) -> None:
    plain = reached("stream", *STEPS, "commit", "fp8_infer", dtype=dtype, head_dim=16)
    program = after(plain, "fuse_gelu_quantise")
    assert program.log[-1].matches == {"GELUs": 3}
    given = inputs(plain, "step")
    wanted = run(plain, "step", given)
    assert same(run(program, "step", given), wanted)
    given["hidden_states"] = 1.1 * given["hidden_states"]
    assert not same(run(program, "step", given), wanted)
