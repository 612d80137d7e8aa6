"""Graphs in TensorRT's dialect, run by the reference of ONNX, against torch in their arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from dialect import Reference, written
from helpers import (
    GEOMETRY,
    HAND_SPEC,
    PASSES,
    after,
    make_program,
    make_recipe,
    reached,
    refused,
)
from streams import AUTOENCODER
from torch import Tensor, fx

from lltk.export.emitter import Dialect, Emitter
from lltk.export.golden import Case, distance, given, plain_cases, transformer_cases
from lltk.export.layers import Fast, meant
from lltk.export.weights import WeightPool
from lltk.graph.geometry import Geometry
from lltk.graph.program import Program
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.implementations import find_implementation, overload
from lltk.ops.nvfp4_paged_attention.reference import empty_pages
from lltk.ops.nvfp4_quantise.reference import nvfp4_quantise
from lltk.ops.nvfp4_quantise.tensorrt_arithmetic import nvfp4_quantise as quantise_as_engine
from lltk.ops.nvfp4_write_page import reference
from lltk.ops.nvfp4_write_page.tensorrt_arithmetic import nvfp4_write_page

pytestmark = pytest.mark.cpu

Step = str | dict[str, Any]
LINEARS = {"nvfp4_infer": {"weight_rule": "mse", "keep_steps": [0]}}
KINDS: dict[str, tuple[Step, ...]] = {
    "bfloat16": (),
    "w4a4": (LINEARS,),
    "cache": ({"nvfp4_cache": {"rule": "none"}}, LINEARS),
    "fp8": ("merge_qkv", "fp8_infer"),
}
SAME: Step = {"lower": {"prefer": ["tensorrt_arithmetic"]}}
CALIBRATED: Step = {
    "nvfp4_infer": {
        "activation_scale": "calibrated",
        "input_scales": {
            f"blocks.{layer}.{part}": 0.002 if part == "ffn.net.2" else 0.003
            for layer in range(2)
            for part in (
                *(f"attn{n}.to_{each}" for n in (1, 2) for each in ("q", "k", "v", "out.0")),
                "ffn.net.0.proj", "ffn.net.2",
            )
        },
    }
}  # fmt: skip
KINDS["calibrated"] = (CALIBRATED,)


def made(steps: tuple[Step, ...], *more: Step) -> Program:
    """A program in bfloat16."""
    base = reached(
        "stream", *PASSES["stream"][:6],
        head_dim=16, layers=2, height=64, width=96, dtype="bfloat16",
    )  # fmt: skip
    return after(base, *steps, *more)


@cache
def external(kind: str) -> Program:
    return made(KINDS[kind], "externalise", "join_commit", "regionalise")


@cache
def cases(kind: str) -> list[Case]:
    """Golden cases, in the arithmetic of engines."""
    own = [SAME] if KINDS[kind] else []
    if kind == "calibrated":  # a product is rounded once, after all scales
        own = [{"lower": {"nvfp4_matmul": "reference"}}]
    return list(transformer_cases(made(KINDS[kind], "regionalise", *own), external(kind)))


@cache
def models(kind: str, folder: Path) -> Path:
    return written(external(kind), folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model(kind: str, graph: str) -> onnx.ModelProto:
    """A graph of a kind of program, without its weights."""
    return Emitter(external(kind), WeightPool(), Dialect.TENSORRT).emit(graph)


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_against_torch_in_their_arithmetic(kind: str, place: Path) -> None:
    """As near as torch is to itself under noise of bfloat16's size, which other latents are not.

    Pages that are not listed hold bytes of 255, which are no numbers.
    """
    folder, seen = models(kind, place), set()
    for case in cases(kind):
        contract = external(kind).contract(case.graph)
        run = Reference(folder / f"{case.graph}.onnx", contract)
        results = run(given(case.inputs, contract))
        for name, held in case.outputs.items():
            apart, own = distance(results[name], held, norms=True), case.spread[held.dtype]
            allowed = max(2 * own, 0.01) if own < 0.5 else (1 + own) / 2
            assert apart <= allowed, (case.graph, name, apart, own)
            seen.add((case.graph, held.dtype))
        if case.graph == "step":  # it is at other timesteps that it denoises or commits
            name = "sample" if "sample" in case.outputs else list(case.outputs)[-1]
            time = torch.where(case.inputs["timestep"] == 0, 900.0, 0.0)
            other = given({**case.inputs, "timestep": time}, contract)
            apart = distance(run(other)[name], case.outputs[name], norms=True)
            assert apart > 2 * case.spread[case.outputs[name].dtype], name
    assert ("step", torch.uint8 if kind == "cache" else torch.bfloat16) in seen
    assert (("step_high", torch.bfloat16) in seen) is (kind in ("w4a4", "cache"))


def test_a_decoder_against_torch(tmp_path: Path) -> None:
    recipe = make_recipe("stream", dtype="bfloat16", height=32, width=64)
    recipe = recipe.model_copy(update={"program": "decode", "passes": ["canonicalise"]})
    own = recipe.model.model_copy(update={"config": AUTOENCODER})
    program = make_program(recipe.model_copy(update={"model": own}))
    folder = written(program, tmp_path)
    for case in plain_cases("decoder", program):
        contract = program.contract(case.graph)
        results = Reference(folder / f"{case.graph}.onnx", contract)(given(case.inputs, contract))
        for name, held in case.outputs.items():
            assert distance(results[name], held, norms=True) <= 2 * case.spread[held.dtype]
        assert case.spread[torch.bfloat16] < 0.2
    kinds = {node.op_type for node in onnx.load(folder / "step.onnx").graph.node}
    assert "Attention" not in kinds and "Softmax" in kinds, "no fused kernel has a single head"


def test_what_layers_are_meant_to_be() -> None:
    """Products of a layer by their weights' format, and each attention."""
    found = {kind: meant(model(kind, "step")) for kind in KINDS}
    assert set(found["bfloat16"].values()) == {Fast.ATTENTION}
    for kind, fast, linears in (
        ("w4a4", Fast.FP4, 8),
        ("calibrated", Fast.FP4, 8),
        ("cache", Fast.FP4, 8),
        ("fp8", Fast.FP8, 6),
    ):
        names = [node for node, each in found[kind].items() if each is fast]
        assert len(names) == 2 * linears and "blocks.1.ffn.net.2/MatMul" in names
        assert [*found[kind].values()].count(Fast.ATTENTION) == 4
    assert set(meant(model("w4a4", "step_high")).values()) == {Fast.ATTENTION}


def test_activations_are_quantised_at_a_constant_scale() -> None:
    """With a scale that is computed, TensorRT decodes both operands and multiplies bfloat16."""
    for kind in ("w4a4", "calibrated", "cache", "fp8"):
        for graph in external(kind).graphs:
            made = model(kind, graph).graph
            constants = {each.name for each in made.initializer}
            for node in made.node:
                if node.op_type in ("TRT_FP4DynamicQuantize", "QuantizeLinear"):
                    assert node.input[1] in constants, node.name


def test_attention_has_a_mask_and_nothing_that_a_parser_ignores() -> None:
    """TensorRT passes over ``nonpad_kv_seqlen``, the seventh input, without a word."""
    for kind in KINDS:
        nodes = [n for n in model(kind, "step").graph.node if n.op_type == "Attention"]
        assert sorted(len(node.input) for node in nodes) == [3, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_float32_is_written_out(tmp_path: Path, dtype: torch.dtype) -> None:
    """There is no fused kernel for it, and TensorRT refuses the op."""
    drawn = torch.Generator().manual_seed(7)
    example = {name: torch.randn(1, 2, 24, 16, generator=drawn).to(dtype) for name in "qkv"}

    def build(call: Callable[..., fx.Node], **qkv: fx.Node) -> dict[str, fx.Node]:
        return {"y": call(torch.ops.aten.scaled_dot_product_attention.default, *qkv.values())}

    found = of_op(tmp_path, example, build)["y"]
    wanted = torch.nn.functional.scaled_dot_product_attention(*example.values())
    assert distance(found, wanted, norms=True) < (1e-5 if dtype is torch.float32 else 0.01)
    kinds = {node.op_type for node in onnx.load(next(tmp_path.rglob("g.onnx"))).graph.node}
    assert ("Attention" in kinds) is (dtype is torch.bfloat16)


def test_nodes_have_names_of_their_own() -> None:
    """By which layers are known: TensorRT joins them for what it merges."""
    for kind in KINDS:
        for graph in external(kind).graphs:
            names = [node.name for node in model(kind, graph).graph.node]
            assert len(set(names)) == len(names)


def test_packed_bytes_are_e2m1_numbers() -> None:
    """Of parameters, and of pages, which are inputs and outputs."""
    four = onnx.TensorProto.FLOAT4E2M1
    graph = model("cache", "step").graph
    program = external("cache")
    weights = {each.name: each for each in graph.initializer if each.data_type == four}
    assert len(weights) == 2 * 8
    for name, each in weights.items():
        rows, half = program.weights[name].shape
        assert tuple(each.dims) == (rows, 2 * half) and name.endswith("weight_codes")
    sizes = {}
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == four:
            sizes[value.name] = [each.dim_value for each in value.type.tensor_type.shape.dim]
    _, pages, tokens, heads, half = program.pages["k_pages_codes_0"].shape
    assert sizes["k_pages_codes_0"] == [1, pages, tokens, heads, 2 * half]
    assert sizes["new_v_pages_codes_1"] == [1, tokens, heads, 2 * half]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"nvfp4_infer": {"activation_rule": "mse"}}, "set nvfp4_infer.activation_rule=none"),
        ({"nvfp4_cache": {"rule": "mae"}}, "set nvfp4_cache.rule=none"),
    ],
)
def test_four_over_six_of_what_is_rounded_in_the_engine(step: Step, message: str) -> None:
    program = made((step,), "externalise", "regionalise")
    emitter = Emitter(program, WeightPool(), Dialect.TENSORRT)
    said = refused(emitter.emit, "commit")
    assert "(blocks.0" in said and message in said


# Single ops, to the bit


def of_op(
    folder: Path, example: dict[str, Tensor], build: Callable[..., dict[str, fx.Node]]
) -> dict[str, Tensor]:
    """What a graph of some calls makes of the example, by the reference of ONNX."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in example}
    for name, node in nodes.items():
        node.meta = {"val": example[name], "module": ""}

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {"val": target(*fx.map_arg(args, lambda each: each.meta["val"])), "module": ""}
        return node

    graph.output(build(call, **nodes))
    program = Program("stream", HAND_SPEC, Geometry(**GEOMETRY), torch.bfloat16, {"g": graph}, {})
    contract = program.contract("g")
    return Reference(written(program, folder) / "g.onnx", contract)(example)


def same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (ours, theirs)))


def value(*shape: int) -> Tensor:
    """Keys whose channels have means, in bfloat16; a head of them is 0."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    drawn += torch.linspace(-2, 2, shape[-1])
    drawn[:, :, 0] = 0
    return drawn.bfloat16()


@pytest.mark.parametrize(("frames", "spared"), [(1, 2), (2, 1), (3, 0)])
def test_what_a_kernel_multiplies_with_zeros(tmp_path: Path, frames: int, spared: int) -> None:
    """Those of its frames that meet none but zeros before a video are not read."""
    aten, drawn = torch.ops.aten, torch.Generator().manual_seed(6)
    x, kernel = (torch.randn(n, 2, f, 3, 3, generator=drawn) for n, f in ((1, frames), (3, 3)))

    def build(call: Callable[..., fx.Node], x: fx.Node, kernel: fx.Node) -> dict[str, fx.Node]:
        video = call(aten.pad.default, x, [1, 1, 1, 1, 2, 0])
        return {"y": call(aten.conv3d.default, video, kernel)}

    video = torch.nn.functional.pad(x, [1, 1, 1, 1, 2, 0])
    wanted = torch.nn.functional.conv3d(video, kernel)
    kernel[:, :, :spared] = torch.nan
    found = of_op(tmp_path, {"x": x, "kernel": kernel}, build)["y"]
    assert torch.allclose(found, wanted, atol=1e-5)
    kernel[:, :, spared] = torch.nan
    (tmp_path / "more").mkdir()
    assert of_op(tmp_path / "more", {"x": x, "kernel": kernel}, build)["y"].isnan().all()


@pytest.mark.parametrize("smoothing", [True, False])
def test_a_new_page(tmp_path: Path, smoothing: bool) -> None:
    names = ["codes", "scales", "decode_scales", *(["means"] if smoothing else [])]

    def build(call: Callable[..., fx.Node], value: fx.Node) -> dict[str, fx.Node]:
        page = call(overload("nvfp4_quantise_page"), value, smoothing, "none")
        return {name: call(operator.getitem, page, i) for i, name in enumerate(names)}

    keys = value(1, 24, 3, 32)
    found = of_op(tmp_path, {"value": keys}, build)
    arenas = empty_pages((1, 2, 24, 3, 32), smoothing)
    nvfp4_write_page(*arenas, keys, torch.tensor([1]))
    for name, arena in zip(names, arenas, strict=False):
        assert same(found[name], arena[:, 1]), name
    plain = empty_pages((1, 2, 24, 3, 32), smoothing)
    reference.nvfp4_write_page(*plain, keys, torch.tensor([1]))
    assert distance(found["codes"], plain[0][:, 1]) < 0.05, "nearly lltk's own"


@pytest.mark.parametrize("smoothing", [True, False])
def test_pages_are_decoded(tmp_path: Path, smoothing: bool) -> None:
    arenas = empty_pages((1, 3, 24, 2, 32), smoothing)
    for slot in range(3):
        keys = (slot + 1) * value(1, 24, 2, 32)
        reference.nvfp4_write_page(*arenas, keys, torch.tensor([slot]))
    names = ["codes", "scales", "decode_scales", *(["means"] if smoothing else [])]
    given = dict(zip(names, arenas, strict=False))

    def build(call: Callable[..., fx.Node], **parts: fx.Node) -> dict[str, fx.Node]:
        every = *(parts[name] for name in names), *([] if smoothing else [None])
        return {"y": call(overload("nvfp4_decode_pages"), *every)}

    found = of_op(tmp_path, given, build)["y"]
    assert same(found, overload("nvfp4_decode_pages")(*arenas))


# The arithmetic in torch


def test_activations_in_the_engines_arithmetic() -> None:
    """Another order of the same steps: as far from x as lltk's own, and few codes differ."""
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(3)) * 5
    ours, theirs = nvfp4_quantise(x), quantise_as_engine(x)
    assert distance(theirs[0], ours[0]) < 0.02
    assert torch.allclose(theirs[2], ours[2], rtol=1e-5)
    padded = quantise_as_engine(x[:, :152])
    assert padded[0].shape == ours[0].shape
    assert not padded[0][:, 76:].any(), "what is padded is 0"


@pytest.mark.parametrize("op", ["nvfp4_matmul", "fp8_matmul"])
def test_products_are_rounded_before_their_scales(op: str) -> None:
    """And are near lltk's own."""
    drawn = torch.Generator().manual_seed(4)
    x, w = torch.randn(5, 64, generator=drawn), torch.randn(7, 64, generator=drawn)
    operands: list[Any] = [*nvfp4_quantise(x), *nvfp4_quantise(w, 16), torch.float32]
    operands[2] = torch.tensor(2.0**-9)  # so that dividing by it is exact
    if op == "fp8_matmul":
        (a, scales), b = fp8_quantise(x), fp8_quantise(w)
        sizes = [2.0 ** -torch.arange(rows, 2 * rows).view(-1, 1).float() for rows in (5, 7)]
        operands = [a, sizes[0], b[0], sizes[1], None, torch.float32]
        assert scales.shape == sizes[0].shape
    found = {
        name: find_implementation(op, name).load()(*operands)
        for name in ("reference", "tensorrt_arithmetic")
    }
    assert distance(found["tensorrt_arithmetic"], found["reference"]) < 0.004
    for name, made in found.items():
        bare = made * 512
        if op == "fp8_matmul":
            bare = made / operands[1] / operands[3].t()
        assert torch.equal(bare, bare.bfloat16().float()) is (name != "reference")


def test_a_bias_is_added_to_what_is_rounded() -> None:
    (a, a_scales), (b, b_scales) = fp8_quantise(torch.ones(1, 16)), fp8_quantise(torch.ones(2, 16))
    bias = torch.tensor([0.03, 0.05]).bfloat16()
    run = find_implementation("fp8_matmul", "tensorrt_arithmetic").load()
    made = run(a, a_scales, b, b_scales, bias, torch.bfloat16)
    assert torch.equal(made, torch.tensor([[16.0, 16.0]]).bfloat16() + bias)


def test_zeros_and_what_is_not_finite() -> None:
    codes, scales, scale = quantise_as_engine(torch.zeros(2, 32))
    assert scale == 1 and not codes.any() and not scales.float().any()
    for bad in (torch.nan, torch.inf):
        assert not quantise_as_engine(torch.tensor([[1.0, bad] * 8]))[2].isfinite()


def test_engines_round_plainly() -> None:
    x = torch.ones(16, 16)
    assert "activation_rule=none" in refused(quantise_as_engine, x, 1, "mse")
    assert "another implementation" in refused(quantise_as_engine, x, 16)
    empty = torch.zeros(0)
    slot = torch.zeros(1, dtype=torch.int64)
    assert "rule=none" in refused(nvfp4_write_page, empty, empty, empty, None, x, slot, "mse")
