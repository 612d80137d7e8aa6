"""fuse_rows: a quantiser or a gated residual becomes one op with the steps before it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import (
    PASSES,
    after,
    compare_results,
    hand_made,
    inputs,
    make_program,
    make_recipe,
    reached,
    refused,
    run,
    same,
    text,
    tiny_config,
)

from lltk.compiler import with_weights
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.passes import make_pass

pytestmark = pytest.mark.cpu

HEAD = """
    def score(x: bf16[1, 4, 16], y: bf16[1, 4, 16], gate: f32[1, 2, 1, 16], \
scale: f32[1, 2, 1, 16], shift: f32[1, 2, 1, 16], weight: f32[16]):
"""
NORM = """\
        # blocks.0.norm1
        to: f32[1, 4, 16] = aten.to.dtype(x, torch.float32)
        layer_norm: f32[1, 4, 16] = aten.layer_norm.default(to, [16], None, None, 1e-06, False)
        # blocks.0
        unflatten: f32[1, 2, 2, 16] = aten.unflatten.int(layer_norm, 1, [-1, 2])
        mul: f32[1, 2, 2, 16] = aten.mul.Tensor(unflatten, scale)
        add: f32[1, 2, 2, 16] = aten.add.Tensor(mul, shift)
        flatten: f32[1, 4, 16] = aten.flatten.using_ints(add, 1, 2)
        to_1: bf16[1, 4, 16] = aten.to.dtype(flatten, torch.bfloat16)
"""
RMS = """\
        # blocks.0.norm3
        to_1: bf16[1, 4, 16] = aten.rms_norm.default(x, [16], weight, 1e-06)
"""
GELU = """\
        # blocks.0.ffn.net.0
        to_1: bf16[1, 4, 16] = aten.gelu.default(x, approximate='tanh')
"""
SUM = """\
        # blocks.0
        to_0: f32[1, 4, 16] = aten.to.dtype(x, torch.float32)
        unflatten_1: bf16[1, 2, 2, 16] = aten.unflatten.int(y, 1, [-1, 2])
        mul_1: f32[1, 2, 2, 16] = aten.mul.Tensor(unflatten_1, gate)
        flatten_1: f32[1, 4, 16] = aten.flatten.using_ints(mul_1, 1, 2)
        add_1: f32[1, 4, 16] = aten.add.Tensor(to_0, flatten_1)
        total: bf16[1, 4, 16] = aten.to.dtype(add_1, torch.bfloat16)
"""
PLAIN = """\
        # blocks.0
        total: bf16[1, 4, 16] = aten.add.Tensor(x, y)
"""
AFFINE = """\
        # blocks.0.norm2
        add_2: f32[16] = aten.add.Tensor(weight, 1)
        to: f32[1, 4, 16] = aten.to.dtype(total, torch.float32)
        layer_norm: f32[1, 4, 16] = aten.layer_norm.default(to, [16], add_2, weight, 1e-06, False)
        to_1: bf16[1, 4, 16] = aten.to.dtype(layer_norm, torch.bfloat16)
"""
NVFP4 = """\
        # blocks.0.attn1.to_q
        nvfp4_quantise: (u8[1, 4, 8], f8e4m3[1, 4, 1], f32[()],) = \
lltk.nvfp4_quantise.default(to_1, 1, 'mse')
        values: u8[1, 4, 8] = getitem(nvfp4_quantise, 0)
        scales: f8e4m3[1, 4, 1] = getitem(nvfp4_quantise, 1)
"""
FP8 = """\
        # blocks.0.attn1.to_q
        quantised: (f8e4m3[1, 4, 16], f32[1, 4, 1],) = \
lltk.row_pipeline.default(to_1, to='fp8')
        values: f8e4m3[1, 4, 16] = getitem(quantised, 0)
        scales: f32[1, 4, 1] = getitem(quantised, 1)
"""
QUANTISED = "        return {'values': values, 'scales': scales}\n"
KEPT = "        return {'values': values, 'scales': scales, 'sample': total}\n"
ALONE = "        return {'sample': total}\n"
CAUSAL = PASSES["stream"][:6]


def made(score: str) -> Program:
    return hand_made("score", Stage.QUANTISED, {"score": score}, layers=2)


def rewritten(score: str, **options: Any) -> tuple[str, dict[str, int]]:
    program = after(made(score), {"fuse_rows": options})
    return text(program, "score"), program.log[-1].matches


def op_calls(graph: str) -> list[str]:
    """The calls of the op in a graph's text."""
    return [line.partition(" = ")[2] for line in graph.splitlines() if ".row_pipeline." in line]


def called(arguments: str) -> str:
    return f"lltk.row_pipeline.default({arguments})"


def test_a_norm_before_a_quantiser_is_fused() -> None:
    whole, matches = rewritten(HEAD + NORM + NVFP4 + QUANTISED)
    assert matches == {"modulated norm → nvfp4": 1}
    assert (
        whole
        == (
            HEAD
            + """\
    # root
    row_pipeline: (u8[1, 4, 8], f8e4m3[1, 4, 1], f32[()],) = lltk.row_pipeline.default(x, \
scale=scale, shift=shift, eps=1e-06, to='nvfp4', rule='mse')
    values: u8[1, 4, 8] = getitem(row_pipeline, 0)
    scales: f8e4m3[1, 4, 1] = getitem(row_pipeline, 1)
    return {'values': values, 'scales': scales}"""
        ).strip()
    )
    whole, matches = rewritten(HEAD + NORM + FP8 + QUANTISED)
    assert matches == {"modulated norm → fp8": 1}
    assert op_calls(whole) == [called("x, scale=scale, shift=shift, eps=1e-06, to='fp8'")]


def test_a_gelu_before_a_quantiser_is_fused() -> None:
    whole, matches = rewritten(HEAD + GELU + FP8 + QUANTISED)
    assert matches == {"gelu → fp8": 1}
    assert (
        whole
        == (
            HEAD
            + """\
    # root
    row_pipeline: (f8e4m3[1, 4, 16], f32[1, 4, 1],) = \
lltk.row_pipeline.default(x, activation='gelu', to='fp8')
    values: f8e4m3[1, 4, 16] = getitem(row_pipeline, 0)
    scales: f32[1, 4, 1] = getitem(row_pipeline, 1)
    return {'values': values, 'scales': scales}"""
        ).strip()
    )


def test_a_sum_that_others_read_too_is_kept() -> None:
    """The op moves to where the sum is read, and what makes the norm's scale moves before it."""
    whole, matches = rewritten(HEAD + SUM + AFFINE + FP8 + KEPT)
    assert matches == {"gated sum → norm → fp8": 1}
    assert (
        whole
        == (
            HEAD
            + """\
    # blocks.0.norm2
    add_2: f32[16] = aten.add.Tensor(weight, 1)
    # blocks.0
    row_pipeline: (f8e4m3[1, 4, 16], f32[1, 4, 1], bf16[1, 4, 16],) = \
lltk.row_pipeline.default(x, y=y, gate=gate, scale=add_2, shift=weight, eps=1e-06, to='fp8', \
keep_sum=True)
    getitem: bf16[1, 4, 16] = getitem(row_pipeline, 2)
    # blocks.0.attn1.to_q
    values: f8e4m3[1, 4, 16] = getitem(row_pipeline, 0)
    scales: f32[1, 4, 1] = getitem(row_pipeline, 1)
    return {'values': values, 'scales': scales, 'sample': getitem}"""
        ).strip()
    )
    norm = "scale=add_2, shift=weight, eps=1e-06"
    whole, matches = rewritten(HEAD + PLAIN + AFFINE + FP8 + KEPT)
    assert matches == {"sum → norm → fp8": 1}
    assert op_calls(whole) == [called(f"x, y=y, {norm}, to='fp8', keep_sum=True")]
    whole, matches = rewritten(HEAD + SUM + AFFINE + FP8 + QUANTISED)
    assert matches == {"gated sum → norm → fp8": 1}
    assert op_calls(whole) == [called(f"x, y=y, gate=gate, {norm}, to='fp8'")]


def test_a_sum_that_is_read_earlier_comes_earlier() -> None:
    read = "        abs_1: bf16[1, 4, 16] = aten.abs.default(total)\n"
    kept = KEPT.replace("total}", "total, 'abs': abs_1}")
    whole, matches = rewritten(HEAD + SUM + read + AFFINE + FP8 + kept)
    assert matches == {"gated sum → norm → fp8": 1}
    assert whole.index("row_pipeline") < whole.index("aten.abs.default(getitem)")


def test_a_gated_sum_alone_is_an_op() -> None:
    whole, matches = rewritten(HEAD + SUM + ALONE)
    assert matches == {"gated sum": 1}
    assert (
        whole
        == (
            HEAD
            + """\
    # blocks.0
    row_pipeline: (bf16[1, 4, 16],) = lltk.row_pipeline.default(x, y=y, gate=gate)
    getitem: bf16[1, 4, 16] = getitem(row_pipeline, 0)
    return {'sample': getitem}"""
        ).strip()
    )


def test_a_new_combination_needs_no_code_of_its_own() -> None:
    """No recipe quantises the GELU of a sum to NVFP4."""
    gelu = GELU.replace("default(x", "default(total")
    for sum_, arguments, label in (
        (SUM, "x, y=y, gate=gate", "gated sum"), (PLAIN, "x, y=y", "sum"),
    ):  # fmt: skip
        for end, more in ((KEPT, ", keep_sum=True"), (QUANTISED, "")):
            whole, matches = rewritten(HEAD + sum_ + gelu + NVFP4 + end)
            assert matches == {f"{label} → gelu → nvfp4": 1}
            form = "activation='gelu', to='nvfp4', rule='mse'"
            assert op_calls(whole) == [called(f"{arguments}, {form}{more}")]
    normed = AFFINE.replace("to_1", "normed") + GELU.replace("default(x", "default(normed")
    whole, matches = rewritten(HEAD + SUM + normed + FP8 + QUANTISED)
    assert matches == {"gated sum → norm → gelu → fp8": 1}
    norm = "scale=add_2, shift=weight, eps=1e-06"
    assert op_calls(whole) == [called(f"x, y=y, gate=gate, {norm}, activation='gelu', to='fp8'")]


def test_results_of_a_new_combination_stay() -> None:
    gelu = GELU.replace("default(x", "default(total")
    plain = made(HEAD + SUM + gelu + NVFP4 + KEPT)
    program = after(plain, "fuse_rows")
    compare_results(plain, program, "score", "gate", lambda gate: gate.flip(1))


def test_a_residual_cast_before_its_gate_is_the_same() -> None:
    early = SUM.replace("unflatten_1: bf16", "unflatten_1: f32").replace("int(y,", "int(to_2,")
    cast = "        to_2: f32[1, 4, 16] = aten.to.dtype(y, torch.float32)\n        unflatten_1:"
    early = early.replace("        unflatten_1:", cast)
    assert rewritten(HEAD + early + ALONE) == rewritten(HEAD + SUM + ALONE)


def test_the_next_blocks_norm_is_left_to_it() -> None:
    later = (AFFINE + FP8).replace("blocks.0", "blocks.1")
    whole, matches = rewritten(HEAD + SUM + later + KEPT)
    assert matches == {"gated sum": 1, "norm → fp8": 1}
    assert op_calls(whole) == [
        called("x, y=y, gate=gate"),
        called("getitem, scale=add_2, shift=weight, eps=1e-06, to='fp8'"),
    ]
    whole, matches = rewritten(HEAD + PLAIN + later + KEPT)
    assert matches == {"norm → fp8": 1}
    assert "aten.add.Tensor(x, y)" in whole


def between(sum_: str = SUM, more: str = "") -> str:
    """A sum of block 0, and the norm of it that block 1 begins with."""
    norm = (NORM + FP8).replace("blocks.0", "blocks.1").replace("dtype(x,", "dtype(total,")
    return HEAD + sum_ + more + norm


@pytest.mark.parametrize("sum_", [SUM, PLAIN], ids=["gated", "plain"])
def test_the_next_blocks_norm_takes_a_sum_in_where_its_rows_are_made_before(sum_: str) -> None:
    """The op and its results are then of no block."""
    whole, matches = rewritten(between(sum_) + KEPT)
    label, gate = ("gated sum", ", gate=gate") if sum_ is SUM else ("sum", "")
    assert matches == {f"{label} → modulated norm → fp8": 1}
    assert (
        whole
        == (
            HEAD
            + f"""\
    # root
    row_pipeline: (f8e4m3[1, 4, 16], f32[1, 4, 1], bf16[1, 4, 16],) = \
lltk.row_pipeline.default(x, y=y{gate}, scale=scale, shift=shift, eps=1e-06, to='fp8', \
keep_sum=True)
    getitem: bf16[1, 4, 16] = getitem(row_pipeline, 2)
    values: f8e4m3[1, 4, 16] = getitem(row_pipeline, 0)
    scales: f32[1, 4, 1] = getitem(row_pipeline, 1)
    return {{'values': values, 'scales': scales, 'sample': getitem}}"""
        ).strip()
    )


READ_AGAIN = """\
        # blocks.0
        abs_1: bf16[1, 4, 16] = aten.abs.default(total)
"""
"""The sum's block reads it: cut out, the block would be computed from what follows it."""
OF_A_BLOCK = """\
        # blocks.0
        sin: f32[1, 2, 1, 16] = aten.sin.default(shift)
        # root
        cos: f32[1, 2, 1, 16] = aten.cos.default(sin)
"""
"""The shift comes from a block."""


@pytest.mark.parametrize("more", [READ_AGAIN, OF_A_BLOCK], ids=["read again", "of a block"])
def test_other_norms_of_the_next_block_are_left_to_it(more: str) -> None:
    made, name = ("abs_1", "") if more is READ_AGAIN else ("cos", "cos")
    whole = between(more=more) + KEPT.replace("}", f", 'more': {made}}}")
    if name:
        whole = whole.replace("Tensor(mul, shift)", f"Tensor(mul, {name})")
    changed, matches = rewritten(whole)
    assert matches == {"gated sum": 1, "modulated norm → fp8": 1}
    assert op_calls(changed)[0] == called("x, y=y, gate=gate")


@pytest.mark.parametrize("operand", ["scale", "shift"])
def test_a_sum_that_its_norm_is_scaled_or_shifted_by_is_left_out(operand: str) -> None:
    """An op that took the sum in would be computed from its own result."""
    own = """\
        # blocks.0
        frames: bf16[1, 2, 2, 16] = aten.unflatten.int(total, 1, [-1, 2])
        mean: f32[1, 2, 1, 16] = aten.mean.dim(frames, [2], True, dtype=torch.float32)
"""
    norm = NORM.replace("dtype(x,", "dtype(total,").replace(f", {operand})", ", mean)")
    plain = made(HEAD + SUM + own + norm + FP8 + KEPT)
    program = after(plain, "fuse_rows")
    assert program.log[-1].matches == {"gated sum": 1, "modulated norm → fp8": 1}
    given = inputs(plain, "score")
    assert same(run(program, "score", given), run(plain, "score", given))


def test_two_norms_of_one_sum_share_it() -> None:
    """The first quantiser takes in the sum, the second reads it."""
    second = AFFINE + FP8
    for name in ("to_1", "to", "add_2", "layer_norm", "quantised", "values", "scales"):
        second = re.sub(rf"\b{name}(?=[:,)])", f"{name}_b", second)
    end = KEPT.replace("}", ", 'more': values_b}")
    whole, matches = rewritten(HEAD + SUM + AFFINE + FP8 + second + end)
    assert matches == {"gated sum → norm → fp8": 1, "norm → fp8": 1}
    assert op_calls(whole)[1].startswith("lltk.row_pipeline.default(getitem, scale=")


@pytest.mark.parametrize("quantiser", [FP8, NVFP4])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'scales': scales}", "'scales': scales, 'norm': layer_norm}"),
        ("aten.mul.Tensor(unflatten, scale)", "aten.sub.Tensor(unflatten, scale)"),
        ("scale: f32[1, 2, 1, 16]", "scale: f32[1, 2, 2, 16]"),
        ("shift: f32[1, 2, 1, 16]", "shift: f32[1, 2, 2, 16]"),
        ("default(to, [16], None, None", "default(to, [4, 16], None, None"),
        ("default(to, [16], None, None", "default(to, [16], None, 0"),
    ],
)
def test_other_norms_stay(old: str, new: str, quantiser: str) -> None:
    whole = HEAD + NORM + quantiser + QUANTISED
    assert old in whole
    message = refused(after, made(whole.replace(old, new)), "fuse_rows")
    assert "quantises no activation, norm or sum that it may take in" in message


def test_an_rms_norm_is_fused() -> None:
    for end, form in ((FP8 + QUANTISED, ", to='fp8'"), ("        return {'sample': to_1}\n", "")):
        plain = made(HEAD.replace("weight: f32", "weight: bf16") + RMS + end)
        program = after(plain, "fuse_rows")
        assert program.log[-1].matches == {"RMS norm" + (" → fp8" if form else ""): 1}
        arguments = f"x, scale=weight, eps=1e-06{form}"
        assert op_calls(text(program, "score")) == [called(arguments)]
        compare_results(plain, program, "score", "weight", lambda weight: weight.flip(0))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight, 1e-06", "None, 1e-06"),
        ("weight, 1e-06", "weight"),
        ("[16], weight", "[4, 16], gate"),
        ("'scales': scales}", "'scales': scales, 'more': to_1}"),
    ],
)
def test_other_rms_norms_stay(old: str, new: str) -> None:
    head = HEAD.replace("gate: f32[1, 2, 1, 16]", "gate: bf16[4, 16]")
    head = head.replace("weight: f32", "weight: bf16")
    whole = head + RMS + FP8 + QUANTISED
    assert old in whole
    message = refused(after, made(whole.replace(old, new)), "fuse_rows")
    assert "quantises no activation, norm or sum that it may take in" in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'scales': scales}", "'scales': scales, 'more': to_1}"),
        (", approximate='tanh'", ""),
        ("gelu.default(x, approximate='tanh')", "silu.default(x)"),
    ],
)
def test_other_activations_stay(old: str, new: str) -> None:
    whole = HEAD + GELU + FP8 + QUANTISED
    assert old in whole
    message = refused(after, made(whole.replace(old, new)), "fuse_rows")
    assert "quantises no activation, norm or sum that it may take in" in message


@pytest.mark.parametrize(
    ("score", "old", "new"),
    [
        (SUM, "aten.mul.Tensor(unflatten_1, gate)", "aten.div.Tensor(unflatten_1, gate)"),
        (SUM, "gate: f32[1, 2, 1, 16]", "gate: f32[1, 2, 2, 16]"),
        (SUM, "gate: f32[1, 2, 1, 16]", "gate: bf16[1, 2, 1, 16]"),
        (SUM, "{'sample': total}", "{'sample': total, 'more': flatten_1}"),
        (SUM, "{'sample': total}", "{'sample': total, 'more': add_1}"),
        (SUM, "aten.add.Tensor(to_0, flatten_1)", "aten.add.Tensor(to_0, flatten_1, alpha=2)"),
        (PLAIN, "bf16[1, 4, 16], y", "bf16[1, 4, 16], y"),
    ],
)
def test_other_sums_stay(score: str, old: str, new: str) -> None:
    whole = HEAD + score + ALONE
    assert old in whole
    message = refused(after, made(whole.replace(old, new)), "fuse_rows")
    assert "adds no gated residual" in message


@pytest.mark.parametrize(
    ("sum_", "old", "new"),
    [
        (SUM, "'sample': total}", "'sample': total, 'wide': add_1}"),
        (SUM, "'sample': total}", "'sample': total, 'added': flatten_1}"),
        (SUM, "add_1: f32[1, 4, 16] =", "add_1: bf16[1, 4, 16] ="),
        (PLAIN, "y: bf16[1, 4, 16]", "y: bf16[1, 1, 16]"),
    ],
)
def test_a_quantiser_takes_in_no_other_sums(sum_: str, old: str, new: str) -> None:
    """They are read before they are rounded, are rounded twice, or repeat their second part."""
    whole = HEAD + sum_ + AFFINE + FP8 + KEPT
    assert old in whole
    changed, matches = rewritten(whole.replace(old, new))
    assert matches == {"norm → fp8": 1}
    assert "aten.add.Tensor(to_0, flatten_1)" in changed or "aten.add.Tensor(x, y)" in changed


@pytest.mark.parametrize("call", ["default(to_1, 16, 'mse')", "default(to_1, 1, 'mse', seed)"])
def test_other_quantisers_stay(call: str) -> None:
    """A pipeline has neither tiles nor stochastic rounding; it is of the norm alone then."""
    head = HEAD.replace("weight: f32[16]", "weight: f32[16], seed: i64[2]")
    call = f"lltk.nvfp4_quantise.{call}"
    whole = head + NORM + re.sub(r"lltk\.nvfp4_quantise\.\S+.*\)", call, NVFP4) + QUANTISED
    changed, matches = rewritten(whole)
    assert matches == {"modulated norm": 1}
    assert call.replace("to_1", "getitem") in changed
    whole = head + GELU + re.sub(r"lltk\.nvfp4_quantise\.\S+.*\)", call, NVFP4) + QUANTISED
    message = refused(after, made(whole), "fuse_rows")
    assert "quantises no activation, norm or sum that it may take in" in message


@pytest.mark.parametrize("sum_", ["", SUM, PLAIN])
def test_a_norm_that_is_not_quantised_is_an_op(sum_: str) -> None:
    """With the sum before it, which is kept if others read it, and with no rounding left out."""
    norm = NORM.replace("dtype(x,", "dtype(total,") if sum_ else NORM
    for others in (True, False):
        more = ", 'total': total" if others and sum_ else ""
        end = f"        return {{'sample': abs_1{more}}}\n"
        read = "        abs_1: bf16[1, 4, 16] = aten.abs.default(to_1)\n"
        plain = made(HEAD + sum_ + norm + read + end)
        program = after(plain, "fuse_rows")
        label = {"": "", SUM: "gated sum → ", PLAIN: "sum → "}[sum_] + "modulated norm"
        assert program.log[-1].matches == {label: 1}
        (call,) = op_calls(text(program, "score"))
        assert ("keep_sum=True" in call) == bool(others and sum_)
        compare_results(plain, program, "score", "x", lambda x: 1.1 * x)


def test_a_norm_in_float32_is_one_too() -> None:
    whole = HEAD + NORM.replace("to.dtype(x, torch.float32)", "mul.Tensor(x, weight)")
    changed, matches = rewritten(whole + FP8 + QUANTISED)
    assert matches == {"modulated norm": 1}
    assert op_calls(changed)[0].startswith("lltk.row_pipeline.default(to, scale=")


def test_widths_that_are_no_blocks_are_for_fp8_alone() -> None:
    def narrow(graph: str) -> str:
        return graph.replace("16]", "8]")

    whole, _ = rewritten(narrow(HEAD + NORM + FP8 + QUANTISED))
    assert op_calls(whole) == [called("x, scale=scale, shift=shift, eps=1e-06, to='fp8'")]
    whole, _ = rewritten(narrow(HEAD + NORM + NVFP4 + QUANTISED))
    assert op_calls(whole) == [called("x, scale=scale, shift=shift, eps=1e-06")]


def test_a_recipe_may_fuse_some_steps_alone() -> None:
    whole = HEAD + SUM + AFFINE + FP8 + KEPT
    for steps, matches in (
        (["norm"], {"norm → fp8": 1}),
        (["residual"], {"gated sum": 1}),
        (["residual", "norm"], {"gated sum → norm → fp8": 1}),
    ):
        assert rewritten(whole, steps=steps)[1] == matches
    message = refused(after, made(whole), {"fuse_rows": {"steps": ["activation"]}})
    assert "matched nothing" in message


@pytest.mark.parametrize(
    "name", ["fuse_norm_quantise", "fuse_gelu_quantise", "fuse_gated_residual"]
)
def test_passes_of_older_recipes_are_named(name: str) -> None:
    message = refused(make_pass, name, {})
    assert message == f"there is no pass {name!r} any more; name fuse_rows once instead"


PIPELINES = {"gated sum → norm": 3, "sum → modulated norm": 3, "modulated norm": 4, "gelu": 3}
"""Those before quantisers, of both graphs: three blocks, and the commit's last keys and values."""
RMS_NORMS = 3 * 3 + 1 + 2
"""Those of three blocks, of the commit's last keys, and of the text's keys."""


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float32", "fp8"), ("bfloat16", "fp8"), ("bfloat16", None)],
)
def test_results_stay(dtype: str, precision: str | None) -> None:
    """In float32 norms are fused in both: torch's own rounds a product and its sum at once."""
    steps = [] if precision is None else [f"{precision}_infer"]
    plain = after(reached("stream", *CAUSAL, dtype=dtype, head_dim=16), *steps)
    program = after(plain, "fuse_rows")
    fused = {f"{label} → {precision}": count for label, count in PIPELINES.items()}
    unquantised = {"gated sum → norm": 3, "sum → modulated norm": 3, "modulated norm": 5}
    alone = {"modulated norm": 1, **fused} if precision else unquantised
    assert program.log[-1].matches == {**alone, "gated sum": 3, "RMS norm": RMS_NORMS}
    if dtype == "float32":
        plain = after(plain, {"fuse_rows": {"steps": ["norm"]}})
    finished = after(program, "regionalise", {"lower": {"paged_attention": "reference"}})
    for graph in ("step", "commit"):
        given = inputs(plain, graph)
        wanted = run(plain, graph, given)
        assert same(run(program, graph, given), wanted)
        assert same(run(finished, graph, given), wanted)
        given["hidden_states"] = 1.1 * given["hidden_states"]
        assert not same(run(program, graph, given), wanted)


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [("float32", ["fp8_infer"]), ("bfloat16", ["fp8_infer"]), ("bfloat16", ["merge_qkv"])],
)
def test_results_across_blocks_stay(dtype: str, steps: list[str]) -> None:
    """The blocks of a step and a commit are one region, but for the commit's last."""
    program = reached("stream", *CAUSAL, "hoist_modulation", dtype=dtype, head_dim=16, layers=3)
    plain = after(program, *steps)
    fused = after(plain, "fuse_rows")
    matches = fused.log[-1].matches
    label = "gated sum → modulated norm"
    assert matches[label] + matches.get(f"{label} → fp8", 0) == 2 + 2 + 1
    assert "gated sum" not in matches
    if dtype == "float32":
        plain = after(plain, {"fuse_rows": {"steps": ["norm"]}})
    finished = after(fused, "regionalise", {"lower": {"paged_attention": "reference"}})
    assert set(finished.regions) == {"prologue_block", "step_block", "commit_block_2"}
    for graph in ("step", "commit"):
        compare_results(plain, fused, graph, "hidden_states", lambda x: 1.1 * x)
        compare_results(plain, finished, graph, "timestep" if graph == "step" else "positions",
                        lambda x: x.flip(-1))  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_in_nvfp4_stay(dtype: str) -> None:
    wide: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64}

    def built(*extra: str) -> Program:
        steps = [*CAUSAL, *extra, "regionalise", "lower"]
        recipe = make_recipe("stream", steps, config=tiny_config(2, **wide), dtype=dtype)
        return make_program(recipe, None if extra else 0)

    weights = built().weights
    plain = with_weights(built("nvfp4_infer"), weights)
    fused = with_weights(built("nvfp4_infer", "fuse_rows"), weights)
    matches = {f"{label} → nvfp4": count for label, count in PIPELINES.items()}
    others = {"modulated norm": 1, "gated sum": 3, "RMS norm": RMS_NORMS}
    assert fused.log[-3].matches == {**matches, **others}
    for graph in ("step", "commit"):
        compare_results(plain, fused, graph, "hidden_states", lambda x: x + torch.randn(()))
