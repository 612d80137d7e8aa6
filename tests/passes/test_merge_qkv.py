"""merge_qkv: queries, keys and values by one linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PASSES,
    after,
    difference,
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
from torch import Tensor

from lltk.compiler import with_weights
from lltk.graph.geometry import Kind
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import load_recipe, open_recipe
from lltk.graph.stages import Stage
from lltk.ops.fp8_rows import fp8_quantise
from lltk.stream.recipe import stream_section

pytestmark = pytest.mark.cpu

ATTENTION = "blocks.0.attn1"


def linear(number: str, part: str, rows: int) -> str:
    module = f"{ATTENTION}.to_{part}"
    return f"""
        # {module}
        linear{number}: f32[1, 4, {rows}] = aten.linear.default(x, self['{module}.weight'], \
self['{module}.bias'])"""


BEFORE = f"""
    def score(x: f32[1, 4, 16]):{linear("", "q", 8)}{linear("_1", "k", 8)}{linear("_2", "v", 12)}
        return {{'q': linear, 'k': linear_1, 'v': linear_2}}
"""
AFTER = f"""
def score(x: f32[1, 4, 16]):
    # {ATTENTION}.to_qkv
    linear_3: f32[1, 4, 28] = aten.linear.default(x, self['{ATTENTION}.to_qkv.weight'], \
self['{ATTENTION}.to_qkv.bias'])
    # {ATTENTION}.to_q
    slice_1: f32[1, 4, 8] = aten.slice.Tensor(linear_3, -1, 0, 8)
    # {ATTENTION}.to_k
    slice_2: f32[1, 4, 8] = aten.slice.Tensor(linear_3, -1, 8, 16)
    # {ATTENTION}.to_v
    slice_3: f32[1, 4, 12] = aten.slice.Tensor(linear_3, -1, 16, 28)
    return {{'q': slice_1, 'k': slice_2, 'v': slice_3}}
"""
WEIGHTS = {
    f"{ATTENTION}.to_{part}.{kind}": torch.randn(rows, *size)
    for part, rows in (("q", 8), ("k", 8), ("v", 12))
    for kind, size in (("weight", (16,)), ("bias", ()))
}
CAUSAL = PASSES["stream"][:6]


def made(score: str = BEFORE, weights: dict[str, Tensor] = WEIGHTS) -> Program:
    return hand_made("score", Stage.CAUSAL, {"score": score}, weights)


def test_rewrites_the_text() -> None:
    program = after(made(), "merge_qkv")
    assert text(program, "score") == AFTER.strip()
    assert program.log[-1].matches == {"self-attention": 1}
    assert list(program.weights) == [f"{ATTENTION}.to_qkv.{kind}" for kind in ("weight", "bias")]


def test_what_reads_other_inputs_stays() -> None:
    other = BEFORE.replace("score(x: f32[1, 4, 16]", "score(x: f32[1, 4, 16], y: f32[1, 4, 16]")
    first, *rest = other.split("default(x,")
    message = refused(after, made("default(y,".join([first, "default(x,".join(rest)])), "merge_qkv")
    assert f"{ATTENTION}.to_qkv: nothing reads all three of one input" in message


def test_weights_of_different_forms_are_refused() -> None:
    some = {name: value for name, value in WEIGHTS.items() if name != f"{ATTENTION}.to_k.bias"}
    graph = BEFORE.replace(f", self['{ATTENTION}.to_k.bias']", "")
    message = refused(after, made(graph, some), "merge_qkv")
    parts = ", ".join(f"{ATTENTION}.{part}" for part in ("to_q", "to_k", "to_v"))
    assert f"{ATTENTION}.to_qkv: 2 of {parts} have a bias; all three or none" in message
    packed = {f"{ATTENTION}.to_q.weight_codes": torch.zeros(8, 8, dtype=torch.uint8)}
    program = after(made(), "merge_qkv")
    assert f"{ATTENTION}.to_q is stored in NVFP4" in refused(program.map_state, packed)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("stream", "float32"), ("stream", "bfloat16"), ("score", "float32")]
)
def test_results_stay(kind: Kind, dtype: str) -> None:
    """The commit's last block has keys and values alone, computed from the same weight."""
    plain = reached(kind, *PASSES[kind][:-2], dtype=dtype)
    program = after(plain, "merge_qkv")
    finished = after(program, "regionalise", "lower")
    wanted = {"self-attention": 3, "a part of it": 1} if kind == "stream" else {"self-attention": 2}
    assert program.log[-1].matches == wanted
    bound = 1e-5 if dtype == "float32" else 0.02
    name = "blocks.1.attn1.to_qkv.weight"
    other = with_weights(plain, plain.weights)
    changed = dict(program.weights) | {name: program.weights[name].roll(1, 0)}
    for graph in plain.graphs:
        given = inputs(plain, graph)
        result = run(other, graph, given)
        assert difference(run(finished, graph, given), result) < bound
        if graph != "prologue":
            moved = run(with_weights(program, program.unmap_state(changed)), graph, given)
            assert difference(moved, result) > 2 * bound


def test_rows_in_fp8_are_the_same() -> None:
    """Each row has a scale of its own, so joining rows changes none."""
    plain = reached("stream", *CAUSAL, head_dim=16)
    ours, wanted = after(plain, "merge_qkv", "fp8_infer"), after(plain, "fp8_infer")
    for graph in ("step", "commit"):
        given = inputs(plain, graph)
        assert difference(run(ours, graph, given), run(wanted, graph, given)) < 1e-5
    assert same(ours.unmap_state(ours.weights), wanted.unmap_state(wanted.weights))
    packed = dict(plain.weights)
    for part in ("q", "k", "v"):
        name = f"{ATTENTION}.to_{part}.weight"
        values, scales = fp8_quantise(packed.pop(name))
        packed |= {f"{name}_values": values, f"{name}_row_scales": scales}
    assert same(with_weights(ours, packed).weights, ours.weights)


def test_adapters_come_before() -> None:
    plain = reached("stream", *CAUSAL)
    lora: dict[str, Any] = {"lora": {"rank": 2}}
    message = refused(after, plain, lora, "merge_qkv")
    assert message.startswith("merge_qkv: 40 adapters are not merged, first blocks.0.attn1.to_k")
    assert message.endswith("put merge_lora before it in the recipe")
    assert refused(after, plain, "merge_qkv", lora) == (
        "lora: queries, keys and values share one linear already; put lora, and merge_lora, "
        "before merge_qkv in the recipe"
    )
    merged = after(plain, lora, "merge_lora", "merge_qkv")
    assert same(merged.weights, after(plain, "merge_qkv").weights)


def test_all_fusions_together() -> None:
    """They run in the order of wan22_5b_stream_fp8.

    Only products may be summed in another order.
    """
    steps = [*CAUSAL, "hoist_modulation", "merge_qkv", "fuse_norm_rope", "fp8_infer", "fuse_rows",
             "regionalise", "lower"]  # fmt: skip
    recipe = make_recipe("stream", steps, config=tiny_config(2, attention_head_dim=16))
    plain = reached("stream", *CAUSAL, head_dim=16)
    program = with_weights(make_program(recipe, None), plain.weights)
    quantised = after(plain, "fp8_infer")
    for graph in ("prologue", "step", "commit"):
        given = inputs(plain, graph)
        wanted = run(quantised, graph, given)
        assert difference(run(program, graph, given), wanted) < 1e-5
        assert difference(run(plain, graph, given), wanted) > 0.005
    assert len(program.regions) == 3


def test_the_fast_recipe_transforms() -> None:
    fast = open_recipe("wan22_5b_stream_fp8", ())
    passes, folder = fast.passes, Path(__file__).parents[2] / "benchmarks" / "precisions"
    kernels, formulas = (load_recipe(folder / f"{name}.yaml") for name in ("fp8", "fp8_reference"))
    assert kernels.passes == passes and formulas.passes == passes[:-1]
    decoding, *compared = (
        stream_section(recipe.stream, "test").decoder.passes for recipe in (fast, kernels, formulas)
    )
    assert decoding is not None and compared == [decoding, decoding[:-1]]
    config = tiny_config(2, attention_head_dim=16)
    program = make_program(make_recipe("stream", passes, config=config, dtype="bfloat16"), None)
    block = text(program, "step_block")
    calls = {"row_pipeline": 5, "rms_norm_rope": 2}
    for op, count in calls.items():
        assert program.implementations[op] == "triton"
        assert block.count(f"lltk.{op}_triton.default(") == count
    assert text(program, "step").count("lltk.row_pipeline_triton.default(") == 1 + 2
    assert program.implementations["fp8_quantise_attention"] == "fp8_decode"
    assert block.count(".fp8_matmul(") == 6
    assert "runs on cuda, not on cpu" in refused(instantiate, program)
