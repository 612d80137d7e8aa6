"""nvfp4_infer: packed weights, activations quantised as they come."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CANONICAL,
    PASSES,
    after,
    difference,
    hand_made,
    inputs,
    make_program,
    make_recipe,
    reexported,
    refused,
    run,
    same,
    text,
    tiny_config,
)
from torch import Tensor

from lltk.artefact import load_program, save_program
from lltk.compiler import transform, with_weights
from lltk.graph.facts import HighSteps
from lltk.graph.fingerprint import fingerprint
from lltk.graph.memory import estimate
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.graph.stages import Stage
from lltk.models.checkpoint import save_checkpoint
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_quantise.reference import nvfp4_quantise
from lltk.stream.rollout import Rollout
from lltk.streaming import plan_stream

pytestmark = pytest.mark.cpu

BEFORE = """
    def step(hidden_states: latents(f32[1, 4, 16])):
        # blocks.0.attn1.to_q
        linear: f32[1, 4, 32] = aten.linear.default(hidden_states, \
self['blocks.0.attn1.to_q.weight'], self['blocks.0.attn1.to_q.bias'])
        # blocks.0.attn1.to_k
        linear_1: f32[1, 4, 32] = aten.linear.default(hidden_states, \
self['blocks.0.attn1.to_k.weight'])
        # root
        add: f32[1, 4, 32] = aten.add.Tensor(linear, linear_1)
        return {'sample': add}
"""
AFTER = """
def step(hidden_states: latents(f32[1, 4, 16])):
    # root
    nvfp4_quantise: (u8[1, 4, 8], f8e4m3[1, 4, 1], f32[()],) = \
lltk.nvfp4_quantise.default(hidden_states, 1, 'none')
    getitem: u8[1, 4, 8] = getitem(nvfp4_quantise, 0)
    getitem_1: f8e4m3[1, 4, 1] = getitem(nvfp4_quantise, 1)
    getitem_2: f32[()] = getitem(nvfp4_quantise, 2)
    # blocks.0.attn1.to_q
    nvfp4_matmul: f32[1, 4, 32] = lltk.nvfp4_matmul.default(getitem, getitem_1, getitem_2, \
self['blocks.0.attn1.to_q.weight_codes'], self['blocks.0.attn1.to_q.weight_scales'], \
self['blocks.0.attn1.to_q.weight_decode_scale'], torch.float32)
    add_1: f32[1, 4, 32] = aten.add.Tensor(nvfp4_matmul, self['blocks.0.attn1.to_q.bias'])
    # blocks.0.attn1.to_k
    nvfp4_matmul_1: f32[1, 4, 32] = lltk.nvfp4_matmul.default(getitem, getitem_1, getitem_2, \
self['blocks.0.attn1.to_k.weight_codes'], self['blocks.0.attn1.to_k.weight_scales'], \
self['blocks.0.attn1.to_k.weight_decode_scale'], torch.float32)
    # root
    add: f32[1, 4, 32] = aten.add.Tensor(add_1, nvfp4_matmul_1)
    return {'sample': add}
"""
WEIGHTS = {
    "blocks.0.attn1.to_q.weight": torch.randn(32, 16),
    "blocks.0.attn1.to_q.bias": torch.ones(32),
    "blocks.0.attn1.to_k.weight": torch.randn(32, 16),
}
STEPS = PASSES["stream"][:6]
WIDE: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64}


def made(weights: dict[str, Tensor] = WEIGHTS) -> Program:
    texts = {name: BEFORE.replace("step", name) for name in ("prologue", "step", "commit")}
    return hand_made("stream", Stage.CAUSAL, texts, weights)


def streaming(*extra: Any, dtype: str = "float32", seed: int | None = 0) -> Program:
    steps = [*STEPS, *extra, "regionalise", "lower"]
    return make_program(
        make_recipe("stream", steps, config=tiny_config(2, **WIDE), dtype=dtype), seed
    )


def quantised(**options: Any) -> Program:
    """The streaming program in W4A4, of the same weights."""
    program = streaming({"nvfp4_infer": options}, seed=None)
    return with_weights(program, streaming().weights)


def test_rewrites_the_text() -> None:
    program = after(made(), "nvfp4_infer")
    assert text(program, "step") == AFTER.strip()
    assert program.log[-1].matches == {"attn1.to_q": 3, "attn1.to_k": 3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_packed_as_training_rounds_them(dtype: str) -> None:
    """Training rounds them in the dtype that it runs in, and saves float32."""
    file, rule = streaming().weights, {"weight_rule": "mse"}
    steps = [*CANONICAL, "text_per_chunk", "teacher_forcing", {"nvfp4_train": rule}]
    recipe = make_recipe("train", steps, config=tiny_config(2, **WIDE), dtype=dtype)
    trained = instantiate(with_weights(make_program(recipe, None), file)).quantised_weights()
    program = streaming({"nvfp4_infer": rule}, dtype=dtype, seed=None)
    packed = with_weights(program, file).weights
    for layer, linear in ((0, "attn1.to_q"), (1, "ffn.net.2")):
        for part, name in (("codes", "codes"), ("scales", "scales"), ("scale", "decode_scale")):
            wanted = trained[f"{linear.replace('.', '_')}_{part}_{layer}"]
            held = packed[f"blocks.{layer}.{linear}.weight_{name}"]
            assert held.dtype == wanted.dtype and torch.equal(held.float(), wanted.float())
        exact = nvfp4_quantise(file[f"blocks.{layer}.{linear}.weight"], 16, "mse").decode_scale
        assert torch.equal(held, exact) == (dtype == "float32")


def test_states_map_both_ways() -> None:
    program, plain = quantised(), streaming()
    back = program.unmap_state(program.weights)
    assert back.keys() == plain.weights.keys()
    name = "blocks.1.ffn.net.2.weight"
    wanted = nvfp4_dequantise(*nvfp4_quantise(plain.weights[name], 16))
    assert torch.equal(back[name], wanted) and back[name].dtype == plain.weights[name].dtype
    own = with_weights(program, program.weights)
    given = inputs(program, "step")
    assert same(run(own, "step", given), run(program, "step", given))
    assert not same(run(plain, "step", given), run(program, "step", given))


def test_the_output_is_the_plain_graphs_over_decoded_operands() -> None:
    program, plain = quantised(), streaming()

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = nvfp4_dequantise(*nvfp4_quantise(x)) @ nvfp4_dequantise(*nvfp4_quantise(weight, 16)).t()
        return y if bias is None else y + bias

    oracle = after(plain)
    for name, graph in oracle.every_graph():
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            if "block" in name:
                node.target = linear
    for graph in ("prologue", "step", "commit"):
        given = inputs(program, graph)
        wanted = run(oracle, graph, given)
        assert difference(run(program, graph, given), wanted) < 1e-5
        assert difference(run(plain, graph, given), wanted) > 0.02


def test_bfloat16_runs_and_exports() -> None:
    program = streaming("nvfp4_infer", dtype="bfloat16", seed=None)
    program = with_weights(program, streaming(dtype="bfloat16").weights)
    given = inputs(program, "step")
    result = run(program, "step", given)
    assert all(value.dtype == torch.bfloat16 for value in result.values())
    assert difference(reexported(program, "step", given), result) < 1e-2


def test_a_stream_rolls_in_four_bits() -> None:
    program = quantised()
    rollout = Rollout(program, instantiate(program))
    geometry, spec = program.geometry, program.spec
    shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
    rollout.set_text(torch.randn(1, geometry.text_tokens, spec.text_dim))
    for chunk in range(3):
        positions = torch.arange(geometry.chunk, dtype=torch.float64) + chunk * geometry.chunk
        with torch.no_grad():
            flow = rollout.step(
                torch.randn(shape), torch.full((1, geometry.chunk), 500.0), positions
            )
            rollout.commit(torch.randn(shape), positions)
        assert bool(flow.isfinite().all())


def test_memory_counts_four_bits() -> None:
    saved = estimate(streaming())["weights"] - estimate(quantised())["weights"]
    linears = [t for n, t in streaming().weights.items() if n.startswith("blocks") and t.dim() == 2]
    packed = sum(t.numel() * 9 // 16 + 4 for t in linears)
    assert saved == sum(t.nbytes for t in linears) - packed


def test_a_program_is_saved_and_loaded(tmp_path: Path) -> None:
    program = quantised(keep_last=0.5)
    save_program(program, tmp_path / "program")
    again = load_program(tmp_path / "program")
    assert fingerprint(again) == fingerprint(program)
    assert again.log[-3].kept == program.log[-3].kept != {}


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors", "torchao"])
def test_a_packed_checkpoint_is_taken_as_it_is(layout: str, tmp_path: Path) -> None:
    program, config = quantised(), tiny_config(2, **WIDE)
    save_checkpoint(tmp_path / "transformer", program.weights, layout, config)
    recipe = make_recipe("stream", [*STEPS, "nvfp4_infer", "regionalise", "lower"])
    model = recipe.model.model_copy(
        update={"checkpoint": str(tmp_path / "transformer"), "config": config}
    )
    loaded = transform(recipe.model_copy(update={"model": model}))
    given = inputs(program, "step")
    if layout == "compressed-tensors":  # its scale is the reciprocal, rounded
        assert difference(run(loaded, "step", given), run(program, "step", given)) < 1e-4
    else:
        assert same(run(loaded, "step", given), run(program, "step", given))
    plain = recipe.model_copy(update={"model": model, "passes": list(PASSES["stream"])})
    said = refused(transform, plain)
    assert "holds weights in NVFP4; add nvfp4_infer" in said
    assert said.endswith("or name weights that are not quantised")


def test_a_packed_checkpoint_infers_in_fp8(tmp_path: Path) -> None:
    """It gives what its decoded values give, and its queries, keys and values can be merged."""
    program, config = quantised(), tiny_config(2, **WIDE)
    save_checkpoint(tmp_path / "transformer", program.weights, "modelopt", config)
    steps = [*STEPS, "merge_qkv", "fp8_infer", "regionalise", "lower"]
    recipe = make_recipe("stream", steps, config=config)
    model = recipe.model.model_copy(update={"checkpoint": str(tmp_path / "transformer")})
    loaded = transform(recipe.model_copy(update={"model": model}))
    decoded = with_weights(transform(recipe, weights=False), program.unmap_state(program.weights))
    given = inputs(loaded, "step")
    assert same(run(loaded, "step", given), run(decoded, "step", given))
    other = with_weights(transform(recipe, weights=False), streaming().weights)
    assert not same(run(loaded, "step", given), run(other, "step", given))


def test_precision_by_denoising_pass() -> None:
    """A pass or a commit that is kept gives the plain program's bits. The others do not."""
    kept, plain, packed = quantised(keep_steps=[0, 2], keep_commit=True), streaming(), quantised()
    assert kept.fact(HighSteps).indices == {0, 2} and "step_high" in kept.graphs
    text_only = {n for n in plain.weights if re.search(r"attn2\.to_[kv]\.weight$", n)}
    assert set(kept.weights) == (set(plain.weights) | set(packed.weights)) - text_only
    back = kept.unmap_state(kept.weights)
    assert back.keys() == plain.weights.keys()
    name = "blocks.1.ffn.net.2.weight"
    assert torch.equal(back[name], plain.weights[name])
    given = inputs(plain, "commit")
    assert same(run(kept, "commit", given), run(plain, "commit", given))
    generator = torch.Generator().manual_seed(0)
    geometry, spec = plain.geometry, plain.spec
    shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
    latents = torch.randn(shape, generator=generator)
    level = torch.full((1, geometry.chunk), 500.0)
    positions = torch.arange(geometry.chunk, dtype=torch.float64)
    text = torch.randn(1, geometry.text_tokens, spec.text_dim, generator=generator)
    results = {}
    for label, program in (("kept", kept), ("plain", plain), ("packed", packed)):
        rollout = Rollout(program, instantiate(program))
        # The prologue is quantised in both but the plain program: give all the plain one's prompt.
        rollout._runtime._text = instantiate(plain)("prologue", {"encoder_hidden_states": text})
        with torch.no_grad():
            results[label] = [rollout.step(latents, level, positions, i) for i in range(3)]
    for index, wanted in enumerate(("plain", "packed", "plain")):
        assert torch.equal(results["kept"][index], results[wanted][index])
    assert not torch.equal(results["plain"][1], results["packed"][1])


def test_widths_that_are_not_whole_blocks() -> None:
    ragged = BEFORE.replace("4, 16]", "4, 24]")
    texts = {name: ragged.replace("step", name) for name in ("prologue", "step", "commit")}
    wide = {n: torch.randn(32, 24) if "weight" in n else w for n, w in WEIGHTS.items()}
    program = hand_made("stream", Stage.CAUSAL, texts, wide)
    message = refused(after, program, "nvfp4_infer")
    assert "blocks.0.attn1.to_q: in 24 features are not a multiple of 16" in message
    padded = after(program, {"nvfp4_infer": {"ragged": "pad"}})
    given = {"hidden_states": torch.randn(1, 4, 24)}
    assert difference(run(padded, "step", given), run(program, "step", given)) < 0.25
    back = padded.unmap_state(padded.weights)["blocks.0.attn1.to_q.weight"]
    assert back.shape == (32, 24)


def test_passes_that_a_chunk_lacks_cannot_be_kept() -> None:
    recipe = open_recipe("tiny_stream_w4a4", ["passes.nvfp4_infer.keep_steps=[0, 4]"])
    assert refused(plan_stream, recipe, "cpu") == (
        "keep_steps: [4] are no passes of a chunk, which has 4 (0 to 3); set keep_steps or "
        "stream.steps"
    )


@cache
def packed() -> tuple[Program, Mapping[str, Tensor]]:
    """A program that takes packed weights, and good ones."""
    return streaming("nvfp4_infer", seed=None), quantised().weights


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scales", torch.full((32, 2), torch.nan).to(torch.float8_e4m3fn), "NaN or negative"),
        ("scales", torch.full((32, 2), -1.0).to(torch.float8_e4m3fn), "NaN or negative"),
        ("scales", torch.ones(32, 4).to(torch.float8_e4m3fn), r"\(32, 4\)"),
        ("codes", torch.zeros(32, 16, dtype=torch.int8), "int8"),
        ("decode_scale", torch.tensor(0.0), "finite and above 0"),
        ("decode_scale", torch.tensor(torch.inf), "finite and above 0"),
    ],
)
def test_bad_packed_weights_are_refused(name: str, value: Tensor, message: str) -> None:
    program, weights = packed()
    spoiled = {**weights, f"blocks.0.attn1.to_q.weight_{name}": value}
    assert re.search(message, refused(with_weights, program, spoiled))


def test_a_missing_part_is_refused() -> None:
    program, weights = packed()
    left = {name: w for name, w in weights.items() if name != "blocks.0.attn1.to_q.weight_scales"}
    assert "weight_scales" in refused(with_weights, program, left)


def test_weights_that_are_not_finite_are_refused() -> None:
    weights = WEIGHTS | {"blocks.0.attn1.to_q.weight": torch.full((32, 16), torch.inf)}
    assert "blocks.0.attn1.to_q.weight: is not finite" in refused(
        after, made(weights), "nvfp4_infer"
    )


def test_training_is_not_for_it() -> None:
    program = make_program(
        make_recipe("train", [*CANONICAL, "text_per_chunk", "teacher_forcing"]), None
    )
    assert "train" in refused(after, program, "nvfp4_infer")
