"""ONNX graphs of Programs, run by ONNX Runtime, against torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import (
    PASSES,
    after,
    difference,
    inputs,
    make_program,
    make_recipe,
    reached,
    refused,
    same,
)
from helpers import run as run_torch
from torch import Tensor

from lltk.compiler import transform
from lltk.export.emitter import Emitter
from lltk.export.weights import WeightPool
from lltk.files.writing import whole_folder
from lltk.graph.contract import Role
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.models.pipelines import find_pipeline

pytestmark = pytest.mark.cpu

STEPS = (*PASSES["stream"][:6], "externalise", "regionalise")
SIZES = {"layers": 3, "height": 64, "width": 96, "head_dim": 16}
LISTED = ((), (2,), (2, 0, 1), (0, 1, 2, 3))
BOUND = 1e-5
"""Of each output's largest value."""


def transformer() -> Program:
    return reached("stream", *STEPS, **SIZES)


@cache
def decoder() -> Program:
    from streams import AUTOENCODER

    recipe = make_recipe("stream").model_copy(
        update={"program": "decode", "passes": ["canonicalise"]}
    )
    model = recipe.model.model_copy(update={"config": AUTOENCODER})
    geometry = recipe.geometry.model_copy(update={"height": 32, "width": 64})
    return make_program(recipe.model_copy(update={"model": model, "geometry": geometry}))


def written(program: Program, folder: Path) -> Path:
    """The program's models in a folder."""
    pool = WeightPool()
    models = {name: Emitter(program, pool).emit(name) for name in program.graphs}
    with whole_folder(folder) as new:
        pool.write(new, "models", models)
    return folder / "models"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(transformer(), tmp_path_factory.mktemp("made") / "transformer")


@pytest.fixture(scope="module")
def decoding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(decoder(), tmp_path_factory.mktemp("made") / "decoder")


def run(folder: Path, graph: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ONNX Runtime makes of a graph in a folder."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / f"{graph}.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in given.items()})
    return {name: torch.from_numpy(v) for name, v in zip(names, values, strict=True)}


def given(graph: str, listed: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Inputs of a transformer's graph."""
    program = transformer()
    made = inputs(program, graph)
    for name in program.contract(graph).having(Role.LISTED):
        made[name] = torch.zeros_like(made[name])
        made[name][list(listed or ())] = True
    return made


def test_no_node_ends_in_an_empty_input(models: Path, decoding: Path) -> None:
    """ONNX Runtime's fusion of norms crashes on one."""
    kinds = set()
    for path in (*models.glob("*.onnx"), *decoding.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        for node in model.graph.node:
            kinds.add(node.op_type)
            assert node.input[-1], node.name
    assert {"LayerNormalization", "Conv", "Clip", "Attention"} <= kinds


@pytest.mark.parametrize("listed", LISTED)
@pytest.mark.parametrize("graph", ["step", "commit"])
def test_step_and_commit(models: Path, graph: str, listed: tuple[int, ...]) -> None:
    made = run(models, graph, given(graph, listed))
    assert difference(made, run_torch(transformer(), graph, given(graph, listed))) < BOUND
    other = given(graph, (1, 3))
    assert difference(run_torch(transformer(), graph, other), made) > 1e-3


def test_prologue(models: Path) -> None:
    text = given("prologue")
    made = run(models, "prologue", text)
    assert difference(made, run_torch(transformer(), "prologue", text)) < BOUND


@pytest.mark.parametrize("graph", ["first", "step"])
def test_decoder(decoding: Path, graph: str) -> None:
    latents = inputs(decoder(), graph)
    made = run(decoding, graph, latents)
    wanted = run_torch(decoder(), graph, latents)
    for name, value in made.items():  # some caches after the first latent are zeros
        assert (value - wanted[name]).abs().max() <= BOUND * wanted[name].abs().max(), name
    assert made["video"].shape == (1, 3, 1 if graph == "first" else 4, 32, 64)


def test_a_first_latent_meets_one_frame_of_a_kernel(decoding: Path, tmp_path: Path) -> None:
    """Before it there are zeros; what they would be multiplied with is not read."""
    weights = {name: weight.clone() for name, weight in decoder().weights.items()}
    kernels = [each for each in weights.values() if each.dim() == 5 and each.shape[2] == 3]
    for kernel in kernels:
        kernel[:, :, :2] = torch.nan
    spoilt = written(replace(decoder(), weights=weights), tmp_path / "made")
    for graph in ("first", "step"):
        latents = inputs(decoder(), graph)
        found, wanted = (run(folder, graph, latents) for folder in (spoilt, decoding))
        assert same(found, wanted) is (graph == "first")


def test_nothing_of_an_unlisted_page_is_seen(models: Path) -> None:
    """A NaN under a mask would be: ONNX Runtime multiplies it by its weight of 0."""
    for graph in ("step", "commit"):
        whole = given(graph, (0, 2))
        wanted = run(models, graph, whole)
        broken = {name: value.clone() for name, value in whole.items()}
        for name in transformer().contract(graph).pages:
            broken[name][:, [1, 3]] = float("nan")
        assert difference(run(models, graph, broken), wanted) == 0
        broken["listed"][1] = True
        assert not all(v.isfinite().all() for v in run(models, graph, broken).values())


def test_models_pass_the_checker(models: Path, decoding: Path) -> None:
    paths = [*models.glob("*.onnx"), *decoding.glob("*.onnx")]
    assert len(paths) == 5
    for path in paths:
        onnx.checker.check_model(path, full_check=True)


def test_masks_have_a_row_a_query(models: Path) -> None:
    """ONNX Runtime wants one, and refuses a row for all queries."""
    model = onnx.shape_inference.infer_shapes(
        onnx.load(models / "step.onnx", load_external_data=False)
    )
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in model.graph.value_info
    }
    masks = [n.input[3] for n in model.graph.node if n.op_type == "Attention" and len(n.input) > 3]
    length = 2 * 2 * 3
    assert len(masks) == 3 and {tuple(shapes[mask]) for mask in masks} == {
        (1, 1, length, 5 * length)
    }


def test_parameters_lie_once_in_one_file(models: Path) -> None:
    """The graphs hold none of their bytes, and name the same places."""
    places: dict[str, tuple[str, ...]] = {}
    for path in models.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = tuple(entry.value for entry in tensor.external_data)
                assert place[0] == "weights.safetensors" and not tensor.raw_data
                assert places.setdefault(tensor.name, place) == place
            else:
                assert np.prod(tensor.dims, dtype=int) <= 64, tensor.name
    weights = transformer().weights
    assert {name.removesuffix(".transposed") for name in places} == {
        *weights, *transformer().constants,
    }  # fmt: skip
    size = sum(4 * tensor.numel() for tensor in weights.values())
    assert size < (models / "weights.safetensors").stat().st_size < size + 40_000


def test_other_weights_are_seen(models: Path, tmp_path: Path) -> None:
    program = transformer()
    name = "blocks.1.attn1.to_q.weight"
    changed = {**program.weights, name: 1.1 * program.weights[name]}
    other = written(replace(program, weights=changed), tmp_path / "other")
    ours, theirs = (run(folder, "step", given("step")) for folder in (other, models))
    assert difference(ours, theirs) > 1e-3


def test_the_shipped_recipe(tmp_path: Path) -> None:
    pipeline = find_pipeline("tiny")
    recipe = open_recipe("tiny_stream", (f"model.checkpoint={pipeline}",))
    own = [*recipe.passes[:6], "externalise", "regionalise"]
    program = transform(recipe.model_copy(update={"passes": own}))
    folder = written(program, tmp_path / "tiny")
    step = inputs(program, "step")
    wanted = run_torch(program, "step", step)
    assert difference(run(folder, "step", step), wanted) < BOUND


def test_what_has_no_form_is_refused_by_name() -> None:
    program = after(decoder(), "fuse_norm_silu")
    message = refused(Emitter(program, WeightPool()).emit, "step")
    assert "has no form in ONNX in this version" in message and "step: cached_norm" in message
    assert "(decoder.mid_block.resnets.0" in message and "lltk.cached_norm_silu" in message
    narrow = reached("stream", *STEPS, dtype="bfloat16")
    message = refused(Emitter(narrow, WeightPool()).emit, "step")
    assert "torch.bfloat16" in message and "model.dtype=float32" in message
