"""Bundles whose checksums all fit and whose parts do not: refused before a graph is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundles import Change, Exported, at, resealed
from helpers import Run, refused
from onnx import ModelProto, TensorProto, helper
from safetensors.torch import load_file

from lltk.export.bundle import read_bundle, verify_bundle
from lltk.export.streams import contradictions
from lltk.files.tensors import save_tensors
from lltk.stream.runtimes.onnx_graph import CUDA, OnnxGraph
from lltk.streaming import plan_bundle

pytestmark = pytest.mark.cpu

STEP = "transformer/step.onnx"
REMEDIES = "restore it", "export the recipe again", "move it", "copy the bundle", "a newer lltk"


@pytest.fixture
def copy(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a bundle, of which no graph can be loaded."""
    monkeypatch.setattr(OnnxGraph, "__init__", lambda *_: pytest.fail("a graph was loaded"))
    return Path(shutil.copytree(exported.bundle, tmp_path / "copy"))


def check_refused(folder: Path, message: str) -> None:
    """By verifying and by planning alike, in one line that names the bundle and says what to do."""
    said = refused(verify_bundle, folder)
    assert refused(plan_bundle, folder) == said
    check_said(said, folder, message)


def check_said(said: str, folder: Path, message: str) -> None:
    assert message in said and said.startswith(str(folder)), said
    assert "\n" not in said and len(said) < 700
    assert any(remedy in said for remedy in REMEDIES), said


def without(*keys: Any) -> Change:
    """Take away what is at some keys."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


GRAPHS = "stages", "transformer", "graphs"
INPUTS, OUTPUTS = (*GRAPHS, "step", "inputs"), (*GRAPHS, "step", "outputs")
MODEL = "stages", "transformer", "model"
DECODER = "stages", "decoder", "graphs"
EVIL = {"shape": [1], "dtype": "f32"}
MANIFESTS: list[tuple[Change, str]] = [
    (at("format", to="1"), "is of format '1', this lltk reads 1"),
    (at("format", to=2), "is of format 2, this lltk reads 1"),
    (at("target", to="tensorrt"), "is for tensorrt, this lltk plays ort, tensorrt-rtx"),
    (at("opset", to=24), "is of opset 24, this lltk reads 23"),
    (at("opset", to="23"), "opset: Input should be a valid integer"),
    (at("evil", to=1), "unknown key 'evil'"),
    (at("files", "../x", to="0"), "lists '../x', which is no file in its folder"),
    (at("files", "/etc/passwd", to="0"), "lists '/etc/passwd', which is no file in its folder"),
    (at("files", "a" * 5000, to="0"), "which is no file in its folder"),
    (at("files", "a\0b", to="0"), "which is no file in its folder"),
    (without("files", STEP), f"has no {STEP}"),
    (without("files", "transformer/weights.safetensors"), "has no transformer/weights.safetensors"),
    (without("files", "golden.safetensors"), "has no golden.safetensors"),
    (without("files", "text/tokenizer.json"), "has no text/tokenizer.json"),
    (without("stages", "decoder"), "decoder/first.onnx is no file of a bundle"),
    (without(*GRAPHS, "commit"), "transformer/commit.onnx is no file of a bundle"),
    (at("text", to={"folder": "x", "digest": "y"}), "text/tokenizer.json is no file of a bundle"),
    (at(*MODEL[:2], "high_steps", to=[0]), "has no graph transformer/step_high, so it plays no"),
    (at(*MODEL[:2], "high_steps", to=[-1]), "high_steps.0: Input should be greater than or equal"),
    (at(*MODEL[:2], "activations", to=-5), "activations: Input should be greater than or equal"),
    (at(*MODEL[:2], "log", 0, "stage", to="x"), "log.0.stage: Input should be"),
    (at(*INPUTS, "timestep", "dtype", to="f128"), "'f128' is no dtype"),
    (at(*INPUTS, "timestep", "role", to="evil"), "timestep.role: Input should be"),
    (at(*INPUTS, "timestep", "role", to="latents"), "time is nothing there, and f32[1, 2] (time)"),
    (at(*INPUTS, "listed", "role", to=None), "listed is b8[4] there, and b8[4] (listed)"),
    (at(*INPUTS, "timestep", "dtype", to="f64"), "timestep is f64[1, 2] (time) there"),
    (at(*INPUTS, "timestep", "shape", to=[1 << 40, 1 << 20]), "timestep is f32[1099511627776, "),
    (at(*INPUTS, "timestep", "shape", to=[-1]), "shape.0: Input should be greater than or equal"),
    (at(*INPUTS, "k_pages_0", "shape", 1, to=2), "k_pages_0 is f32[1, 2, 4, 2, 16] (pages) there"),
    (at(*INPUTS, "evil", to=EVIL), "transformer/step: evil is f32[1] there, and nothing"),
    (without(*INPUTS, "timestep"), "time is nothing there"),
    (without(*OUTPUTS, "sample"), "sample is nothing there"),
    (at(*OUTPUTS, "sample", "dtype", to="u8"), "sample is u8[1, 4, 2, 2, 4] there"),
    (
        at(*GRAPHS, "commit", "outputs", ..., "shape", to=[1, 9]),
        "transformer/commit: new_k_pages_0 is f32[1, 9] there, and f32[1, 4, 2, 16] in a stream",
    ),
    (at(*GRAPHS, "prologue", "outputs", ..., "shape", 1, to=9), "cross_k_0 is f32[1, 9, 2, 16]"),
    (without(*GRAPHS, "commit", "inputs", "hidden_states"), "commit: hidden_states is nothing"),
    (at(*DECODER, "first", "outputs", "video", "shape", 4, to=8), "decoder/first: video is f32[1"),
    (at(*DECODER, "step", "inputs", ..., "role", to=None), "decoder/step: cache_0 is f32"),
    (at(*DECODER, "step", "outputs", "next_cache_3", "shape", to=[]), "next_cache_3 is f32[]"),
    (at("stages", "text", "graphs", "encode", "outputs", "evil", to=EVIL), "evil is f32[1] there"),
    (
        at("stages", "text", "graphs", "encode", "inputs", ..., "shape", to=[1, 4]),
        "text/encode: token_mask is b8[1, 4] (token_mask) there",
    ),
    (at(*MODEL, to={}), "stages.transformer.model"),
    (at("stages", "decoder", "model", to={"a": 1}), "stages.decoder.model"),
    (at(*MODEL, "channels", to=7), "hidden_states is f32[1, 4, 2, 2, 4] (latents) there"),
    (at(*MODEL, "patch", to=[0, 0, 0]), "transformer: its model has a size below 1"),
    (at(*MODEL, "stride", 0, to=-4), "transformer: its model has a size below 1"),
    (at(*MODEL, "rope_split", to=[2, 2, 2]), "rotary: is not as model and geometry ask for"),
    (at(*MODEL, "output", to="evil"), "evil is nothing there"),
    (at("stages", "decoder", "model", "caches", to=19), "decoder/first: next_cache_19 is f32"),
    (at("rotary", to={}), "rotary: is not as model and geometry ask for"),
    (at("sampler", to=[[1.0]]), "sampler: is not a row of 9 for each of 4 passes"),
    (at("sampler", 0, 1, to=0.5), "sampler: is not that of 4 passes with a shift of 5"),
    (at("recipe", to={}), "recipe: program: Field required"),
    (at("recipe", "program", to="train"), "recipe: is not of a stream of one video"),
    (at("recipe", "geometry", "batch", to=2), "recipe: is not of a stream of one video"),
    (at("recipe", "geometry", "height", to=1 << 40), "geometry.height: Input should be less than"),
    (at("recipe", "geometry", "height", to=33), "geometry.height: 33 pixels is not a multiple"),
    (at("recipe", "geometry", "width", to=32), "rotary: is not as model and geometry ask for"),
    (at("recipe", "geometry", "window", to=16), "k_pages_0 is f32[1, 4, 4, 2, 16] (pages) there"),
    (at("recipe", "geometry", "text_tokens", to=9), "encoder_hidden_states is f32[1, 12, 64]"),
    (at("recipe", "model", "config", to="../x"), "recipe: has no configuration of its model"),
    (without("recipe", "stream"), "recipe: has no stream section"),
]


@pytest.mark.parametrize(("change", "message"), MANIFESTS, ids=map(str, range(len(MANIFESTS))))
def test_what_a_manifest_contradicts(copy: Path, change: Change, message: str) -> None:
    resealed(copy, change)
    check_refused(copy, message)


def untold(content: Any) -> None:
    """Take the golden values of a page away."""
    for case in content["golden"]:
        if case["graph"] == "commit":
            for held in case["outputs"], case["bounds"]:
                del held["new_k_pages_0"]


GOLDEN: list[tuple[Change, str]] = [
    (at("golden", to=[]), "transformer/prologue has no golden value of"),
    (untold, "transformer/commit has no golden value of new_k_pages_0"),
    (without("golden", 5, "outputs", "new_k_pages_0"), "case 5 has no bound for each output"),
    (at("golden", 1, "outputs", "more", to="1.sample"), "case 1 has other inputs or outputs"),
    (at("golden", 0, "stage", to="evil"), "golden case 0 is of no graph"),
    (at("golden", 0, "graph", to="../x"), "golden case 0 is of no graph"),
    (at("golden", 0, "inputs", ..., to="evil"), "encoder_hidden_states has no value that fits"),
    (at("golden", 1, "inputs", "hidden_states", to="1.listed"), "hidden_states has no value that"),
    (at("golden", 1, "outputs", "sample", to="0.cross_k_0"), "sample has no value that fits"),
    (at("golden", 1, "inputs", to={}), "golden case 1 has other inputs or outputs"),
    (at("golden", 1, "outputs", to={}), "golden case 1 has other inputs or outputs"),
    (at("golden", 1, "bounds", to={}), "golden case 1 has no bound for each output"),
    (at("golden", 1, "bounds", "sample", to=0.0), "bounds.sample: Input should be greater than 0"),
]


@pytest.mark.parametrize(("change", "message"), GOLDEN, ids=map(str, range(len(GOLDEN))))
def test_golden_values_that_say_nothing(copy: Path, change: Change, message: str) -> None:
    resealed(copy, change)
    check_said(refused(verify_bundle, copy), copy, message)


def test_golden_values_are_every_nth_element(exported: Exported, tmp_path: Path) -> None:
    """Of 64 there are 64, 32, 22, but not 40."""
    folder = Path(shutil.copytree(exported.bundle, tmp_path / "copy"))
    path, name = folder / "golden.safetensors", "1.sample"
    tensors = load_file(path)
    flat = tensors[name].flatten()
    for held in (flat[::2], flat[::3]):
        save_tensors(path, {**tensors, name: held}, {})
        resealed(folder)
        verify_bundle(folder)
    save_tensors(path, {**tensors, name: flat[:40]}, {})
    resealed(folder)
    check_said(refused(verify_bundle, folder), folder, "sample has no value that fits")


def first_parameter(model: ModelProto) -> TensorProto:
    return next(each for each in model.graph.initializer if each.external_data)


def place(key: str, value: str) -> Callable[[ModelProto], None]:
    """Say otherwise where a parameter is."""

    def change(model: ModelProto) -> None:
        for entry in first_parameter(model).external_data:
            if entry.key == key:
                entry.value = value

    return change


def elsewhere() -> TensorProto:
    """A tensor that lies in a file outside."""
    tensor = TensorProto(name="evil", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    return tensor


def read_in_an_attribute(model: ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Constant", [], ["evil"], value=elsewhere()))


def read_in_a_branch(model: ModelProto) -> None:
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])
    copy = helper.make_node("Identity", ["evil"], ["out"])
    branch = helper.make_graph([copy], "branch", [], [out], [elsewhere()])
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    model.graph.node.insert(
        0, helper.make_node("If", ["yes"], ["more"], then_branch=branch, else_branch=branch)
    )


def with_a_function(model: ModelProto) -> None:
    copy = helper.make_node("Identity", ["x"], ["y"])
    opset = helper.make_opsetid("", 23)
    model.functions.append(helper.make_function("", "f", ["x"], ["y"], [copy], [opset]))


def with_another_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 99


def with_another_domain(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def of_another_domain(model: ModelProto) -> None:
    model.graph.node[3].domain = "com.microsoft"


def of_no_op(model: ModelProto) -> None:
    model.graph.node[3].op_type = "Evil"


def of_a_later_format(model: ModelProto) -> None:
    model.ir_version = 99


def of_another_dtype(model: ModelProto) -> None:
    first_parameter(model).data_type = TensorProto.DOUBLE


def of_another_shape(model: ModelProto) -> None:
    first_parameter(model).dims[0] = 1 << 40


def unknown(model: ModelProto) -> None:
    first_parameter(model).name = "evil"


def one_more_input(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("evil", TensorProto.FLOAT, [3]))


def one_more_output(model: ModelProto) -> None:
    name = model.graph.node[3].output[0]
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]))


def a_size_that_is_not_fixed(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "frames"


def another_size(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (place("location", "/etc/passwd"), "reads '/etc/passwd', and may read weights.safetensors"),
        (place("location", "../golden.safetensors"), "reads '../golden.safetensors', and may read"),
        (place("offset", "0"), "otherwise than weights.safetensors has it"),
        (place("offset", "-5"), "otherwise than weights.safetensors has it"),
        (place("length", "99999999999"), "otherwise than weights.safetensors has it"),
        (of_another_dtype, "otherwise than weights.safetensors has it"),
        (of_another_shape, "otherwise than weights.safetensors has it"),
        (unknown, "reads evil, which is not in weights.safetensors"),
        (read_in_an_attribute, "(Constant) is no plain op of ONNX"),
        (read_in_a_branch, "(If) is no plain op of ONNX"),
        (of_another_domain, "is no plain op of ONNX"),
        (of_no_op, "(Evil) is no plain op of ONNX"),
        (with_a_function, "holds more than a graph"),
        (with_another_opset, "has opsets {'': 99}"),
        (with_another_domain, "'com.example': 1"),
        (of_a_later_format, "version 99 of ONNX's format"),
        (one_more_input, "evil, and not hidden_states"),
        (one_more_output, "and not sample as the manifest says"),
        (a_size_that_is_not_fixed, "hidden_states is not f32[1, 4, 2, 2, 4] (latents) as the"),
        (another_size, "sample is not f32[1, 4, 2, 2, 4] as the manifest says"),
    ],
    ids=map(str, range(20)),
)
def test_models_that_no_export_writes(
    copy: Path, change: Callable[[ModelProto], None], message: str
) -> None:
    model = onnx.load(copy / STEP, load_external_data=False)
    change(model)
    onnx.save(model, copy / STEP)
    resealed(copy)
    check_refused(copy, message)


def _no_text(folder: Path) -> None:
    data, name = (folder / STEP).read_bytes(), b"patch_embedding/Gather"
    assert name in data
    (folder / STEP).write_bytes(data.replace(name, name[:-1] + b"\xff"))


def _outside(folder: Path) -> None:
    shutil.move(folder / "decoder", folder.parent / "elsewhere")
    (folder / "decoder").symlink_to(folder.parent / "elsewhere")


def _pipe(folder: Path) -> None:
    (folder / "golden.safetensors").unlink()
    os.mkfifo(folder / "golden.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / STEP).write_bytes(b"\xff" * 99), "is no model in ONNX"),
        (lambda folder: (folder / STEP).write_bytes(b""), "has opsets {}"),
        (_no_text, "has names that are no text"),
        (lambda folder: (folder / "decoder/weights.safetensors").write_bytes(b""), "is damaged ("),
        (lambda folder: (folder / "notes").write_text("mine"), "notes is no file of a bundle"),
        (_outside, "decoder/first.onnx: is a link that leaves the bundle; copy the bundle"),
    ],
)
def test_other_files(copy: Path, change: Callable[[Path], object], message: str) -> None:
    change(copy)
    resealed(copy)
    check_refused(copy, message)


def test_a_pipe_is_no_file(copy: Path) -> None:
    _pipe(copy)
    check_refused(copy, "golden.safetensors: is missing")


def test_a_link_to_a_bundle_is_followed(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(exported.bundle)
    assert read_bundle(tmp_path / "link") == read_bundle(exported.bundle)
    assert not list(contradictions(read_bundle(exported.bundle)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is no tokenizer (Model missing."),
        ("hello", "is no tokenizer (expected value"),
        (None, "has a token 1000"),
    ],
)
def test_other_tokenizers(
    exported: Exported, tmp_path: Path, text: str | None, message: str
) -> None:
    folder = Path(shutil.copytree(exported.bundle, tmp_path / "copy"))
    path = folder / "text" / "tokenizer.json"
    if text is None:
        content = json.loads(path.read_text())
        content["model"]["vocab"] |= {"evil": 1000}
        text = json.dumps(content)
    path.write_text(text)
    resealed(folder)
    check_said(refused(verify_bundle, folder), folder, message)
    check_said(refused(plan_bundle(folder).text_encoder(None).encode, ["a"]), folder, message)


def test_a_provider_that_does_not_start_is_refused(exported: Exported) -> None:
    """ONNX Runtime would take the CPU's in its place."""
    with pytest.warns(UserWarning, match="not in available provider names"):
        message = refused(OnnxGraph, exported.bundle / STEP, provider=CUDA)
    assert message.startswith("--provider: CUDAExecutionProvider does not start here"), message


def test_what_fails_in_onnx_runtime_is_said(exported: Exported, run: Run, tmp_path: Path) -> None:
    """In one message, on loading as on running."""
    folder = Path(shutil.copytree(exported.bundle, tmp_path / "copy"))
    for change, message in (_dropped, "does not load it"), (_huge, "fails in ONNX Runtime"):
        shutil.copy(exported.bundle / STEP, folder / STEP)
        model = onnx.load(folder / STEP, load_external_data=False)
        change(model)
        onnx.save(model, folder / STEP)
        resealed(folder)
        code, out, err = run("bundle", "verify", str(folder))
        assert code == 2 and not out and message in err and err.count("error:") == 1, err


def _dropped(model: ModelProto) -> None:
    del model.graph.node[5]


def _huge(model: ModelProto) -> None:
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [2], [1 << 20, 1 << 20])
    model.graph.initializer.append(sizes)
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["sizes"], ["huge"]))
