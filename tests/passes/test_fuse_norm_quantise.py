"""fuse_norm_quantise: a norm and what quantises it become one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    PASSES,
    after,
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

pytestmark = pytest.mark.cpu

BEFORE = """
    def step(hidden_states: bf16[1, 4, 16], scale: f32[1, 2, 1, 16], shift: f32[1, 2, 1, 16]):
        # blocks.0.norm1
        to: f32[1, 4, 16] = aten.to.dtype(hidden_states, torch.float32)
        layer_norm: f32[1, 4, 16] = aten.layer_norm.default(to, [16], None, None, 1e-06, False)
        # blocks.0
        unflatten: f32[1, 2, 2, 16] = aten.unflatten.int(layer_norm, 1, [-1, 2])
        mul: f32[1, 2, 2, 16] = aten.mul.Tensor(unflatten, scale)
        add: f32[1, 2, 2, 16] = aten.add.Tensor(mul, shift)
        flatten: f32[1, 4, 16] = aten.flatten.using_ints(add, 1, 2)
        to_1: bf16[1, 4, 16] = aten.to.dtype(flatten, torch.bfloat16)
        nvfp4_quantise: (u8[1, 4, 8], f8e4m3[1, 4, 1], f32[()],) = \
lltk.nvfp4_quantise.default(to_1, 1, 'mse')
        getitem: u8[1, 4, 8] = getitem(nvfp4_quantise, 0)
        return {'sample': getitem}
"""
AFTER = """
def step(hidden_states: bf16[1, 4, 16], scale: f32[1, 2, 1, 16], shift: f32[1, 2, 1, 16]):
    # blocks.0.norm1
    nvfp4_quantise_norm: (u8[1, 4, 8], f8e4m3[1, 4, 1], f32[()],) = \
lltk.nvfp4_quantise_norm.default(hidden_states, scale, shift, 1e-06, 'mse')
    # blocks.0
    getitem: u8[1, 4, 8] = getitem(nvfp4_quantise_norm, 0)
    return {'sample': getitem}
"""
NVFP4 = ("(u8[1, 4, 8], f8e4m3[1, 4, 1], f32[()],)", "u8[1, 4, 8]")
FP8 = ("(f8e4m3[1, 4, 16], f32[1, 4, 1],)", "f8e4m3[1, 4, 16]")
STEPS = PASSES["stream"][:6]


def in_fp8(graph: str) -> str:
    """The text with FP8 for NVFP4, whose ops take no rule."""
    for old, new in zip(NVFP4, FP8, strict=True):
        graph = graph.replace(old, new)
    return graph.replace("nvfp4", "fp8").replace(", 1, 'mse'", "").replace(", 'mse'", "")


def made(step: str = BEFORE) -> Program:
    texts = {name: step.replace("step", name) for name in ("prologue", "step", "commit")}
    return hand_made("stream", Stage.QUANTISED, texts)


@pytest.mark.parametrize("form", [str, in_fp8])
def test_rewrites_the_text(form: Callable[[str], str]) -> None:
    program = after(made(form(BEFORE)), "fuse_norm_quantise")
    assert text(program, "step") == form(AFTER).strip()
    assert program.log[-1].matches == {"modulated norms": 3}


@pytest.mark.parametrize("form", [str, in_fp8])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{'sample': getitem}", "{'sample': getitem, 'norm': layer_norm}"),
        ("aten.mul.Tensor(unflatten, scale)", "aten.sub.Tensor(unflatten, scale)"),
        ("scale: f32[1, 2, 1, 16]", "scale: f32[1, 2, 2, 16]"),
        ("torch.float32)\n        layer_norm: f32[1, 4, 16] = aten.layer_norm.default(to, [16], "
         "None, None", "torch.float32)\n        layer_norm: f32[1, 4, 16] = "
         "aten.layer_norm.default(to, [16], None, 0"),
        ("]):\n        # blocks.0.norm1\n        to: f32[1, 4, 16] = aten.to.dtype(hidden_states, "
         "torch.float32)", "], y: f32[1, 4, 16]):\n        # blocks.0.norm1\n"
         "        to: f32[1, 4, 16] = aten.add.Tensor(hidden_states, y)"),
    ],
)  # fmt: skip
def test_other_norms_stay(old: str, new: str, form: Callable[[str], str]) -> None:
    assert old in BEFORE
    message = refused(after, made(form(BEFORE.replace(old, new))), "fuse_norm_quantise")
    assert "quantises no norm that it alone reads" in message


def test_widths_that_are_no_blocks_are_for_fp8_alone() -> None:
    def narrow(graph: str) -> str:
        return graph.replace("16]", "8]")

    program = after(made(narrow(in_fp8(BEFORE))), "fuse_norm_quantise")
    assert text(program, "step") == narrow(in_fp8(AFTER)).strip()


def test_results_in_fp8_stay() -> None:
    """In bfloat16, which hides how a product and a sum were rounded before."""
    plain = reached("stream", *STEPS, "fp8_infer", dtype="bfloat16", head_dim=16)
    program = after(plain, "fuse_norm_quantise")
    assert program.log[-1].matches == {"modulated norms": 7, "norms": 3}
    given = inputs(plain, "step")
    wanted = run(plain, "step", given)
    assert same(run(program, "step", given), wanted)
    given["hidden_states"] = 1.1 * given["hidden_states"]
    assert not same(run(program, "step", given), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_stay(dtype: str) -> None:
    wide: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64}

    def built(*extra: str) -> Program:
        steps = [*STEPS, "nvfp4_infer", *extra, "regionalise", "lower"]
        return make_program(
            make_recipe("stream", steps, config=tiny_config(2, **wide), dtype=dtype), None
        )

    plain = built()
    weights = make_program(
        make_recipe(
            "stream", [*STEPS, "regionalise", "lower"], config=tiny_config(2, **wide),
            dtype=dtype,
        ), 0,
    ).weights  # fmt: skip
    plain, fused = with_weights(plain, weights), with_weights(built("fuse_norm_quantise"), weights)
    assert fused.log[-3].matches == {"modulated norms": 7, "norms": 3}
    for graph in ("step", "commit"):
        given = inputs(plain, graph)
        wanted = run(plain, graph, given)
        assert same(run(fused, graph, given), wanted)
        given["hidden_states"] = given["hidden_states"] + torch.randn(())
        assert not same(run(fused, graph, given), wanted)
