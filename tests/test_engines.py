"""Engines, built by TensorRT for RTX and looked at; nothing here can run them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from helpers import Run, refused
from onnx import TensorProto, helper, numpy_helper

from lltk.calibrating import calibrated
from lltk.export.bundle import emit, read_bundle
from lltk.export.emitter import IR_VERSION, OPSET, Dialect
from lltk.export.engines import EngineOrder, build_engine
from lltk.export.kernels import kernel_sizes, write_kernels
from lltk.export.layers import Fast, Layer, lint, meant
from lltk.exporting import plan_export
from lltk.files.writing import whole_folder
from lltk.graph.recipe import open_recipe
from lltk.stream.runtimes.tensorrt import BINDINGS, library_version
from lltk.stream.runtimes.tensorrt_types import DTYPES, tensor_shape

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(find_spec(BINDINGS) is None, reason="TensorRT for RTX is not installed"),
]

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("tiny_stream", {}),
    "w4a4": ("tiny_stream_w4a4", {"nvfp4_infer": {"weight_rule": "mse"}}),
    "cache": (
        "tiny_stream_nvfp4",
        {"nvfp4_infer": {"weight_rule": "mse"}, "nvfp4_cache": {"rule": "none"}},
    ),
    "fp8": ("tiny_stream_fp8", {}),
}
HALVES = ("model.dtype=bfloat16", "stream.decoder.dtype=bfloat16")


def recipe(kind: str, folder: Path) -> Path:
    """A shipped recipe in bfloat16, rounded as engines can."""
    name, options = RECIPES[kind]
    base = open_recipe(name, HALVES).resolved()
    names = [each if isinstance(each, str) else next(iter(each)) for each in base["passes"]]
    base["passes"] = [{each: options[each]} if each in options else each for each in names]
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def layers(bundle: Path, graph: str) -> list[Layer]:
    text = (bundle / "engines" / f"transformer.{graph}.layers.json").read_text()
    return [Layer.model_validate(each) for each in json.loads(text)]


@pytest.mark.parametrize(
    ("kind", "sm", "fast", "products"),
    [
        ("bfloat16", 120, None, 0),
        ("cache", 120, Fast.FP4, 64),
        ("fp8", 89, Fast.FP8, 64),
    ],
)
def test_a_bundle(
    run: Run, tmp_path: Path, kind: str, sm: int, fast: Fast | None, products: int
) -> None:
    """Every graph is built, every product and attention is a fast layer, and the inputs fit."""
    line = ["export", recipe(kind, tmp_path), "--target", "tensorrt-rtx", "--sm", sm]
    code, out, err = run(*line, "-o", tmp_path / "bundle", "--text", "reference")
    assert code == 0, err
    assert "They were not run" in " ".join(out.split())
    bundle = tmp_path / "bundle"
    facts = read_bundle(bundle)
    assert facts.engines and facts.engines.version == library_version()
    assert {each.graph for each in facts.engines.built} == {"prologue", "step", "first"}
    path = bundle / "transformer" / "step.onnx"
    wanted = meant(onnx.load(path, load_external_data=False))
    assert not list(lint(wanted, layers(bundle, "step")))
    counts = [list(wanted.values()).count(each) for each in Fast]
    assert counts[-1] == 16 and sum(counts) == 16 + products
    assert not products or list(wanted.values()).count(fast) == products  # type: ignore[arg-type]
    tensors = parsed(path)
    specs = facts.stages["transformer"].graphs["step"].contract
    assert specs.gives_pages and "sample" in specs.outputs
    for name, spec in {**specs.inputs, **specs.outputs}.items():
        assert tensors[name] == (DTYPES[spec.dtype], tensor_shape(spec)), name
    assert set(tensors) == {*specs.inputs, *specs.outputs}
    files = (
        "engines/decoder.first.engine",
        "engines/decoder.step.engine",
        "decoder/weights.safetensors",
    )
    first, step, weights = ((bundle / name).stat().st_size for name in files)
    assert first + 0.5 * weights < step, "it holds the frames of kernels that meet the latent"


def step_layers(path: Path, folder: Path, sm: int = 120, plugin: bool = False) -> list[Layer]:
    """The layers of the step's engine alone, each of which is as it was meant."""
    order = EngineOrder(sm, plugin=plugin)
    plan = plan_export(open_recipe(str(path)), text="reference", engines=order)
    pool, models = emit(plan.transformer, Dialect.TENSORRT)
    with whole_folder(folder) as new:
        pool.write(new, "transformer", models)
        if sizes := kernel_sizes(plan.transformer):
            write_kernels(new, sizes, sm, under="kernels")
    model = folder / "transformer" / "step.onnx"
    kernels = folder / "kernels" if plugin else None
    made = build_engine(model, folder / "engine", sm, kernels)
    wanted = meant(onnx.load(model, load_external_data=False))
    assert not list(lint(wanted, made.layers))
    return made.layers


@pytest.mark.parametrize(
    ("kind", "sm", "fast", "count"),
    [("w4a4", 120, Fast.FP4, 60), ("bfloat16", 89, Fast.ATTENTION, 16)],
)
def test_a_step(tmp_path: Path, kind: str, sm: int, fast: Fast, count: int) -> None:
    """Of other kinds than the bundles; some products are merged."""
    found = step_layers(recipe(kind, tmp_path), tmp_path / "made", sm)
    assert sum(each.is_fast(fast) for each in found) >= count


def test_a_plugin(tmp_path: Path) -> None:
    """It attends in every block's self-attention, and nothing else decodes pages."""
    found = step_layers(recipe("cache", tmp_path), tmp_path / "made", plugin=True)
    attending = [each for each in found if each.kind == "custom_layer"]
    assert len(attending) == 8 and {each.does for each in attending} == {Fast.ATTENTION}
    assert all(each.inputs.count("FP4E2M1") == 2 for each in attending)
    assert not any("attn1/DequantizeLinear" in node for each in found for node in each.nodes)


def test_calibrated_scales(tmp_path: Path) -> None:
    """Products are of FP4 operands, with fewer layers around them."""
    path = recipe("w4a4", tmp_path)
    base = yaml.safe_load(path.read_text())
    parts = [f"attn{n}.to_{each}" for n in (1, 2) for each in ("q", "k", "v", "out.0")]
    parts += ["ffn.net.0.proj", "ffn.net.2"]
    scales = {f"blocks.{layer}.{part}": 0.002 for layer in range(8) for part in parts}
    path.write_text(yaml.safe_dump(calibrated(base, scales)))
    found = step_layers(path, tmp_path / "made")
    assert sum(each.is_fast(Fast.FP4) for each in found) > 60
    assert not any("/Div" in node for each in found for node in each.nodes)


def parsed(model: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of a model's inputs and outputs, as TensorRT has them."""
    trt = import_module(BINDINGS)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            pass

    log = Log()
    network = trt.Builder(log).create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(model))
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    tensors += [network.get_output(index) for index in range(network.num_outputs)]
    return {each.name: (each.dtype.name, tuple(each.shape)) for each in tensors}


# Forms that TensorRT takes, and makes slow layers of

ROWS, WIDTH, COLUMNS = 48, 256, 512
FOUR, EIGHT, HALF = TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16


def weight(name: str, kind: int, *shape: int) -> TensorProto:
    size = int(np.prod(shape)) // (2 if kind == FOUR else 1)
    drawn = np.random.default_rng(0).integers(20, 80, size, dtype=np.uint8)
    return TensorProto(name=name, data_type=kind, dims=shape, raw_data=drawn.tobytes())


def saved(folder: Path, nodes: Sequence[onnx.NodeProto], parameters: Sequence[TensorProto]) -> Path:
    """A model of [1, ROWS, WIDTH] to [1, ROWS, COLUMNS]."""
    for node in nodes:
        node.name = node.name or f"linear/{node.op_type}"
    x = helper.make_tensor_value_info("x", HALF, [1, ROWS, WIDTH])
    y = helper.make_tensor_value_info("y", HALF, [1, ROWS, COLUMNS])
    one = numpy_helper.from_array(np.float32(1), "one")
    graph = helper.make_graph(list(nodes), "g", [x], [y], [one, *parameters])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("trt", 1)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), path)
    return path


def node(kind: str, inputs: str, output: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=name or output, **attributes)


DECODED_FOUR = [
    node("DequantizeLinear", "scales one", "wide"),
    node("DequantizeLinear", "codes wide", "values", axis=-1, block_size=16),
    node("Cast", "values", "half", to=HALF),
    node("Transpose", "half", "turned", perm=[1, 0]),
]
DECODED_EIGHT = [
    node("DequantizeLinear", "values one", "wide"),
    node("Cast", "wide", "half", to=HALF),
    node("Transpose", "half", "turned", perm=[1, 0]),
]


def four_bits() -> list[TensorProto]:
    """A weight in FP4."""
    codes = weight("codes", FOUR, COLUMNS, WIDTH)
    return [codes, weight("scales", EIGHT, COLUMNS, WIDTH // 16)]


def slow(path: Path, sm: int) -> list[str]:
    made = build_engine(path, path.with_suffix(".engine"), sm)
    return list(lint(meant(onnx.load(path)), made.layers))


def test_weights_alone_in_fp4_are_no_fp4_product(tmp_path: Path) -> None:
    product = node("MatMul", "x turned", "y", "linear/MatMul")
    parameters = [
        weight("codes", FOUR, COLUMNS, WIDTH),
        weight("scales", EIGHT, COLUMNS, WIDTH // 16),
    ]
    (said,) = slow(saved(tmp_path, [*DECODED_FOUR, product], parameters), 120)
    assert said.startswith("linear: linear/MatMul is not a product of FP4 operands but ")


@pytest.mark.parametrize("constant", [True, False])
def test_fp8_at_a_scale_that_is_computed_is_no_fp8_product(tmp_path: Path, constant: bool) -> None:
    """Nothing is said of it: the product is one of bfloat16."""
    computed = [
        node("Abs", "wide_x", "size"),
        node("ReduceMax", "size", "largest", keepdims=0),
        node("Mul", "largest part", "scale"),
    ]
    scale = "one" if constant else "scale"
    nodes = [
        *DECODED_EIGHT,
        node("Cast", "x", "wide_x", to=TensorProto.FLOAT),
        *([] if constant else computed),
        node("QuantizeLinear", f"wide_x {scale} zero", "q"),
        node("DequantizeLinear", f"q {scale}", "d"),
        node("Cast", "d", "left", to=HALF),
        node("MatMul", "left turned", "y", "linear/MatMul"),
    ]
    parameters = [
        weight("values", EIGHT, COLUMNS, WIDTH),
        numpy_helper.from_array(np.float32(1 / 448), "part"),
        TensorProto(name="zero", data_type=EIGHT, raw_data=bytes(1)),
    ]
    found = slow(saved(tmp_path, nodes, parameters), 89)
    assert bool(found) is not constant, found


@pytest.mark.parametrize(("heads", "dtype"), [(1, HALF), (2, TensorProto.FLOAT), (2, HALF)])
def test_attention_that_has_no_fused_kernel(tmp_path: Path, heads: int, dtype: int) -> None:
    """Of one head as the decoder has it, or in float32."""
    width = 256
    values = [
        helper.make_tensor_value_info(name, dtype, [1, heads, 64, width // heads])
        for name in "qkvo"
    ]
    attention = helper.make_node("Attention", ["q", "k", "v"], ["o"], name="mid/Attention")
    graph = helper.make_graph([attention], "g", values[:3], values[3:])
    opset = [helper.make_opsetid("", OPSET)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION), path)
    if dtype == HALF and heads > 1:
        assert not slow(path, 120)
    else:
        said = refused(build_engine, path, tmp_path / "engine", 120)
        assert "not supported by a dedicated kernel" in said


def test_fp4_for_another_gpu_ends_in_an_error(tmp_path: Path) -> None:
    """Where nothing was checked before."""
    parameters = [
        weight("codes", FOUR, COLUMNS, WIDTH),
        weight("scales", EIGHT, COLUMNS, WIDTH // 16),
    ]
    path = saved(tmp_path, [*DECODED_FOUR, node("MatMul", "x turned", "y")], parameters)
    said = refused(build_engine, path, tmp_path / "engine", 89)
    assert "builds no engine of it" in said and "fp4_e2m1" in said
    assert not (tmp_path / "engine").exists()


def test_a_model_that_is_none_ends_in_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path, [node("Reshape", "x", "y")], [])
    assert "builds no engine of it: " in refused(build_engine, path, tmp_path / "engine", 120)
