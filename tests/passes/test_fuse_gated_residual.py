"""fuse_gated_residual: a gated sum becomes one op, with the norm that quantises it."""

from __future__ import annotations

import pytest
from helpers import PASSES, Steps, after, hand_made, inputs, reached, refused, run, same, text

from lltk.graph.program import Program
from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu

HEAD = "def score(x: bf16[1, 4, 16], y: bf16[1, 4, 16], gate: f32[1, 2, 1, 16], scale: f32[16]):"
SUM = f"""
    {HEAD}
        # blocks.0
        to: f32[1, 4, 16] = aten.to.dtype(x, torch.float32)
        unflatten: bf16[1, 2, 2, 16] = aten.unflatten.int(y, 1, [-1, 2])
        mul: f32[1, 2, 2, 16] = aten.mul.Tensor(unflatten, gate)
        flatten: f32[1, 4, 16] = aten.flatten.using_ints(mul, 1, 2)
        add: f32[1, 4, 16] = aten.add.Tensor(to, flatten)
        to_1: bf16[1, 4, 16] = aten.to.dtype(add, torch.bfloat16)
"""
PLAIN = f"""
    {HEAD}
        # blocks.0
        to_1: bf16[1, 4, 16] = aten.add.Tensor(x, y)
"""
NORM = """\
        add_1: f32[16] = aten.add.Tensor(scale, 1)
        # blocks.0.norm2
        fp8_quantise_norm: (f8e4m3[1, 4, 16], f32[1, 4, 1],) = \
lltk.fp8_quantise_norm.default(to_1, add_1, scale, 1e-06)
        getitem: f8e4m3[1, 4, 16] = getitem(fp8_quantise_norm, 0)
        getitem_1: f32[1, 4, 1] = getitem(fp8_quantise_norm, 1)
"""
ALONE = "        return {'sample': to_1}\n"
NORMED = NORM + "        return {'sample': to_1, 'values': getitem, 'scales': getitem_1}\n"
GATED_ADD = f"""
{HEAD}
    # blocks.0
    gated_add: bf16[1, 4, 16] = lltk.gated_add.default(x, y, gate)
    return {{'sample': gated_add}}
"""
ADD_NORM = f"""
{HEAD}
    # blocks.0
    add_1: f32[16] = aten.add.Tensor(scale, 1)
    fp8_quantise_add_norm: (bf16[1, 4, 16], f8e4m3[1, 4, 16], f32[1, 4, 1],) = \
lltk.fp8_quantise_add_norm.default(x, y, gate, add_1, scale, 1e-06)
    getitem_2: bf16[1, 4, 16] = getitem(fp8_quantise_add_norm, 0)
    # blocks.0.norm2
    getitem: f8e4m3[1, 4, 16] = getitem(fp8_quantise_add_norm, 1)
    getitem_1: f32[1, 4, 1] = getitem(fp8_quantise_add_norm, 2)
    return {{'sample': getitem_2, 'values': getitem, 'scales': getitem_1}}
"""
CAUSAL = PASSES["stream"][:6]


def made(score: str) -> Program:
    return hand_made("score", Stage.QUANTISED, {"score": score}, layers=2)


def rewritten(score: str) -> tuple[str, dict[str, int]]:
    program = after(made(score), "fuse_gated_residual")
    return text(program, "score"), program.log[-1].matches


def test_rewrites_the_text() -> None:
    assert rewritten(SUM + ALONE) == (GATED_ADD.strip(), {"gated sums": 1})
    assert rewritten(SUM + NORMED) == (ADD_NORM.strip(), {"gated sums and norms": 1})
    ungated = ADD_NORM.replace("x, y, gate, add", "x, y, None, add").strip()
    assert rewritten(PLAIN + NORMED) == (ungated, {"sums and norms": 1})


def test_a_residual_cast_before_its_gate_is_the_same() -> None:
    early = SUM.replace("unflatten: bf16", "unflatten: f32").replace("int(y,", "int(to_0,")
    cast = "        to_0: f32[1, 4, 16] = aten.to.dtype(y, torch.float32)\n        unflatten:"
    early = early.replace("        unflatten:", cast)
    assert rewritten(early + ALONE) == (GATED_ADD.strip(), {"gated sums": 1})


def test_the_next_blocks_norm_is_left_to_it() -> None:
    next_block = NORMED.replace("blocks.0", "blocks.1").replace(
        "        add_1", "        # blocks.1\n        add_1"
    )
    found, matches = rewritten(SUM + next_block)
    assert matches == {"gated sums": 1}
    assert "lltk.gated_add.default(x, y, gate)" in found
    assert "lltk.fp8_quantise_norm.default(gated_add, add_1" in found


@pytest.mark.parametrize(
    ("score", "old", "new"),
    [
        (SUM, "aten.mul.Tensor(unflatten, gate)", "aten.div.Tensor(unflatten, gate)"),
        (SUM, "gate: f32[1, 2, 1, 16]", "gate: f32[1, 2, 2, 16]"),
        (SUM, "gate: f32[1, 2, 1, 16]", "gate: bf16[1, 2, 1, 16]"),
        (SUM, "{'sample': to_1}", "{'sample': to_1, 'more': flatten}"),
        (SUM, "{'sample': to_1}", "{'sample': to_1, 'more': add}"),
        (SUM, "aten.add.Tensor(to, flatten)", "aten.add.Tensor(to, flatten, alpha=2)"),
        (PLAIN, "bf16[1, 4, 16], y", "bf16[1, 4, 16], y"),
    ],
)
def test_others_stay(score: str, old: str, new: str) -> None:
    whole = score + ALONE
    assert old in whole
    message = refused(after, made(whole.replace(old, new)), "fuse_gated_residual")
    assert "adds no gated residual, nor one that is normed in FP8" in message


@pytest.mark.parametrize(
    ("dtype", "steps", "matches"),
    [
        ("float32", ("fp8_infer", "fuse_norm_quantise"), [3, 3, 3]),
        ("bfloat16", ("fp8_infer", "fuse_norm_quantise"), [3, 3, 3]),
        ("bfloat16", (), [0, 0, 6]),
    ],
)
def test_results_stay(dtype: str, steps: Steps, matches: list[int]) -> None:
    plain = after(reached("stream", *CAUSAL, dtype=dtype, head_dim=16), *steps)
    program = after(plain, "fuse_gated_residual")
    kinds = ("gated sums and norms", "sums and norms", "gated sums")
    assert [program.log[-1].matches.get(kind, 0) for kind in kinds] == matches
    finished = after(program, "regionalise", {"lower": {"paged_attention": "reference"}})
    for graph in ("step", "commit"):
        given = inputs(plain, graph)
        wanted = run(plain, graph, given)
        assert same(run(program, graph, given), wanted)
        assert same(run(finished, graph, given), wanted)
        given["hidden_states"] = 1.1 * given["hidden_states"]
        assert not same(run(program, graph, given), wanted)
