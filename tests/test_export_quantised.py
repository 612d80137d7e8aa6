"""Ops of quantised recipes in ONNX, run by ONNX Runtime, against their references in torch."""

from __future__ import annotations

import operator
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    GEOMETRY,
    HAND_SPEC,
    PASSES,
    after,
    inputs,
    reached,
)
from nvfp4_pages import written as written_pages
from torch import Tensor, fx

from lltk.export.emitter import Emitter
from lltk.export.golden import (
    Case,
    distance,
    given,
    places,
    run_external,
    transformer_cases,
)
from lltk.export.weights import WeightPool
from lltk.files.tensors import read_tensors
from lltk.files.writing import whole_folder
from lltk.graph.edit import copy_graph, output
from lltk.graph.geometry import Geometry
from lltk.graph.module import instantiate
from lltk.graph.packed import is_packed
from lltk.graph.program import Program
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_paged_attention.reference import Pages, decode
from lltk.ops.nvfp4_quantise.reference import RULES, nvfp4_quantise
from lltk.stream.runtimes.onnx_graph import OnnxGraph

pytestmark = pytest.mark.cpu

Build = Callable[[Callable[..., fx.Node], dict[str, fx.Node]], fx.Node | dict[str, fx.Node]]


class Graph:
    """Some calls as one graph: in torch, and in ONNX Runtime."""

    def __init__(
        self,
        folder: Path,
        example: Mapping[str, Tensor],
        build: Build,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        graph, weights = fx.Graph(), dict(weights or {})
        inputs = {name: graph.placeholder(name) for name in example}
        inputs |= {name: graph.create_node("get_attr", name) for name in weights}
        for name, node in inputs.items():
            node.meta = {"val": {**example, **weights}[name], "module": ""}

        def call(target: Any, *args: Any, **options: Any) -> fx.Node:
            node = graph.call_function(target, args, options)
            plain = fx.map_arg((args, options), lambda each: each.meta["val"])
            node.meta = {"val": target(*plain[0], **plain[1]), "module": ""}
            return node

        made = build(call, inputs)
        graph.output(made if isinstance(made, dict) else {"y": made})
        program = Program(
            "stream", HAND_SPEC, Geometry(**GEOMETRY), torch.float32, {"g": graph}, weights
        )
        owner = torch.nn.Module()
        for name, value in weights.items():
            owner.register_buffer(name, value)
        self._module = fx.GraphModule(owner, graph)
        self.path = written(program, folder) / "g.onnx"
        self._session = OnnxGraph(self.path)

    def torch(self, **given: Tensor) -> dict[str, Tensor]:
        return dict(self._module(**given))

    def onnx(self, **given: Tensor) -> dict[str, Tensor]:
        return self._session(given)


def written(program: Program, folder: Path) -> Path:
    """The program's models in a new folder in ``folder``."""
    pool = WeightPool()
    models = {name: Emitter(program, pool).emit(name) for name in program.graphs}
    place = folder / str(len(list(folder.iterdir())))
    with whole_folder(place) as new:
        pool.write(new, "models", models)
    return place / "models"


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether all bytes are the same."""
    return all(
        torch.equal(*(t[name].contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs)))
        for name in theirs
    )


def near(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    return max(distance(ours[name], theirs[name]) for name in theirs)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ties() -> Tensor:
    """Quotients that lie between two codes, and on scales that lie between two E4M3 numbers."""
    steps = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -2.5, -5, -0.0])
    rows = [torch.cat([steps, steps[-2:]]) * s for s in (1, 1.0625, 17, 448 / 6, 2**-9)]
    return torch.stack(rows).repeat(1, 2)


HARD = {
    "normal": normal(7, 64),
    "padded": normal(3, 40, seed=1),
    "ties": ties(),
    "tiny": 1e-30 * normal(4, 32, seed=2),
    "least": torch.full((2, 32), 1e-45),
    "large": 1e30 * normal(4, 32, seed=3),
    "outlier": torch.cat([normal(2, 32, seed=4), 1e6 * torch.eye(2, 32)]),
    "sums": (8 * normal(8000, 64)).round() / 8,  # rounded in another order, another error is less
    "zeros": torch.zeros(2, 32),
    "one row": normal(1, 16, seed=5) * torch.logspace(-9, 3, 16),
}


def identity(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The identity in NVFP4, without rounding."""
    codes = 2 * torch.eye(width, dtype=torch.uint8)  # E2M1's 1
    ones = torch.ones(width, width // 16).to(torch.float8_e4m3fn)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), ones, torch.tensor(1.0)


def random_weight(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in NVFP4 in which every byte of codes and of scales comes up."""
    codes = torch.arange(rows * width // 2).mul(7).to(torch.uint8).view(rows, -1)
    scales = torch.arange(rows * width // 16).mul(5).remainder(127).to(torch.uint8)
    return codes, scales.view(torch.float8_e4m3fn).view(rows, -1), torch.tensor(0.37)


PARTS = ("w_codes", "w_scales", "w_scale")


def product(rule: str) -> Build:
    """x in NVFP4, multiplied with a weight."""

    def build(call: Callable[..., fx.Node], inputs: dict[str, fx.Node]) -> fx.Node:
        quantised = call(overload("nvfp4_quantise"), inputs["x"], 1, rule)
        parts = [call(operator.getitem, quantised, i) for i in range(3)]
        weight = (inputs[part] for part in PARTS)
        return call(overload("nvfp4_matmul"), *parts, *weight, torch.float32)

    return build


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", HARD)
def test_activations_are_quantised_to_the_bit(tmp_path: Path, name: str, rule: str) -> None:
    """A product with the identity shows them: all but one summand of each sum are zeros."""
    x = HARD[name]
    weight = dict(zip(PARTS, identity(-(-x.shape[1] // 16) * 16), strict=True))
    graph = Graph(tmp_path, {"x": x}, product(rule), weight)
    made = graph.onnx(x=x)["y"]
    wanted = nvfp4_dequantise(*nvfp4_quantise(x, 1, rule))
    assert torch.equal(made, wanted) and (bool(wanted.any()) or name in ("zeros", "least"))


def test_weights_are_decoded_to_the_bit(tmp_path: Path) -> None:
    """The identity, which quantising does not change, shows a weight's columns."""
    weight = random_weight(48, 64)
    graph = Graph(
        tmp_path, {"x": torch.eye(64)}, product("none"), dict(zip(PARTS, weight, strict=True))
    )
    made = graph.onnx(x=torch.eye(64))
    assert equal(made, graph.torch(x=torch.eye(64)))
    assert near(made, {"y": nvfp4_dequantise(*weight).t()}) < 1e-6


def test_products_keep_float32(tmp_path: Path) -> None:
    """Runtimes that fuse what decodes with the product may round activations to 8 bits."""
    x, weight = normal(33, 256), random_weight(96, 256)
    graph = Graph(tmp_path, {"x": x}, product("mse"), dict(zip(PARTS, weight, strict=True)))
    assert near(graph.onnx(x=x), graph.torch(x=x)) < 1e-6
    assert near(graph.onnx(x=x + 0.01 * normal(33, 256, seed=1)), graph.torch(x=x)) > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(tmp_path: Path, bad: float) -> None:
    """In every output, as in torch; ONNX Runtime's largest of a NaN may be a number."""
    x = normal(5, 32)
    x[3, 17] = bad
    weight = dict(zip(PARTS, identity(32), strict=True))
    assert Graph(tmp_path, {"x": x}, product("mse"), weight).onnx(x=x)["y"].isnan().all()
    value = normal(1, 4, 3, 32)
    value[0, 2, 1, 17] = bad
    made = Graph(tmp_path, {"value": value}, page(True, "mse")).onnx(value=value)
    assert made["2"].isnan().tolist() == [[False, True, False]]


def page(smoothing: bool, rule: str) -> Build:
    """A page, part by part."""

    def build(call: Callable[..., fx.Node], inputs: dict[str, fx.Node]) -> dict[str, fx.Node]:
        made = call(overload("nvfp4_quantise_page"), inputs["value"], smoothing, rule)
        return {str(i): call(operator.getitem, made, i) for i in range(4 if smoothing else 3)}

    return build


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("smoothing", [False, True])
def test_pages_are_quantised_to_the_bit(tmp_path: Path, smoothing: bool, rule: str) -> None:
    value = normal(1, 24, 3, 32) * torch.tensor([1e-20, 1.0, 300.0])[:, None] + normal(32, seed=1)
    value[0, 5:9, 1] = -0.0
    value[0, :, 2, 7] = torch.tensor([2.0**30, 1, -(2.0**30)] + 21 * [0.0])  # float32 loses the 1
    graph = Graph(tmp_path, {"value": value}, page(smoothing, rule))
    made = graph.onnx(value=value)
    assert equal(made, graph.torch(value=value))
    value[0, 3, 1, 4] *= 1.5
    assert not equal(graph.onnx(value=value), made)


@pytest.mark.parametrize("smoothing", [False, True])
def test_pages_are_decoded_to_the_bit(tmp_path: Path, smoothing: bool) -> None:
    arenas = written_pages(normal(1, 4, 24, 3, 32), smoothing)
    held = {f"part_{i}": part for i, part in enumerate(arenas) if part is not None}

    def build(call: Callable[..., fx.Node], inputs: dict[str, fx.Node]) -> fx.Node:
        parts = [inputs.get(f"part_{i}") for i in range(4)]
        return call(overload("nvfp4_decode_pages"), *parts)

    graph = Graph(tmp_path, held, build)
    made = graph.onnx(**held)["y"]
    assert torch.equal(made, decode(Pages(*arenas), torch.arange(4)).view(1, 4, 24, 3, 32))


FP8_WEIGHT = dict(zip(("b", "b_scales"), fp8_quantise(normal(48, 64, seed=3)), strict=True))


@pytest.mark.parametrize("name", ["normal", "outlier", "zeros", "large"])
def test_rows_in_fp8(tmp_path: Path, name: str) -> None:
    """To the bit, and products as near as float32 is."""
    x = HARD[name]
    weight = {
        "b": FP8_WEIGHT["b"][:, : x.shape[1]].contiguous(),
        "b_scales": FP8_WEIGHT["b_scales"],
    }

    def build(call: Callable[..., fx.Node], inputs: dict[str, fx.Node]) -> dict[str, fx.Node]:
        rows = call(overload("row_pipeline"), inputs["x"], to="fp8")
        parts = [call(operator.getitem, rows, i) for i in range(2)]
        weight = inputs["b"], inputs["b_scales"]
        made = call(overload("fp8_matmul"), *parts, *weight, inputs["bias"], torch.float32)
        return {"values": parts[0], "scales": parts[1], "y": made}

    graph = Graph(tmp_path, {"x": x}, build, {**weight, "bias": normal(48, seed=4)})
    made, wanted = graph.onnx(x=x), graph.torch(x=x)
    assert equal(made, {part: wanted[part] for part in ("values", "scales")})
    assert near(made, wanted) < 1e-6


ROWS = {
    "x": normal(2, 6, 32),
    "y": normal(2, 6, 32, seed=1),
    "gate": normal(4, 1, 32, seed=2),
    "scale": normal(2, 1, 32, seed=3),
    "shift": normal(2, 1, 32, seed=4),
}


@pytest.mark.parametrize(
    "options",
    [
        {"names": "y"},
        {"names": "y gate", "activation": "gelu", "keep_sum": True},
        {"names": "scale shift", "eps": 1e-5, "to": "nvfp4", "rule": "mse"},
        {"names": "y gate scale shift", "eps": 1e-5, "to": "fp8", "keep_sum": True},
        {"names": "scale", "eps": 1e-5},
        {"names": "", "activation": "gelu", "to": "e4m3"},
    ],
)
def test_rows_fused(tmp_path: Path, options: dict[str, Any]) -> None:
    """Groups are of three and of six rows."""
    names = options.pop("names").split()
    counts = {"nvfp4": 3, "fp8": 2}.get(options.get("to", ""), 1)
    weight = dict(zip(PARTS, identity(32), strict=True)) if counts == 3 else {}

    def build(call: Callable[..., fx.Node], inputs: dict[str, fx.Node]) -> dict[str, fx.Node]:
        given = {name: inputs[name] for name in names}
        made = call(overload("row_pipeline"), inputs["x"], **given, **options)
        parts = [call(operator.getitem, made, i) for i in range(counts)]
        if weight:
            parts = [
                call(overload("nvfp4_matmul"), *parts, *(inputs[p] for p in PARTS), torch.float32)
            ]
        if options.get("keep_sum"):
            parts.append(call(operator.getitem, made, counts))
        return {str(i): part for i, part in enumerate(parts)}

    rows = {name: ROWS[name] for name in ("x", *names)}
    graph = Graph(tmp_path, rows, build, weight)
    made, wanted = graph.onnx(**rows), graph.torch(**rows)
    for part, value in wanted.items():
        # Two results about a border are rounded apart.
        bound = 2e-6 if value.dtype == torch.float32 and not weight else 0.1
        assert distance(made[part], value) < bound, part
    for name in names:
        assert near(graph.onnx(**{**rows, name: rows[name] * 2}), wanted) > 0.2, name


def test_norms_with_positions(tmp_path: Path) -> None:
    x = {
        "x": normal(1, 6, 32),
        "cos": normal(1, 6, 1, 16, seed=1),
        "sin": normal(1, 6, 1, 16, seed=2),
    }

    def build(call: Callable[..., fx.Node], inputs: dict[str, fx.Node]) -> fx.Node:
        return call(
            overload("rms_norm_rope"), *(inputs[n] for n in ("x", "weight", "cos", "sin")), 1e-6
        )

    graph = Graph(tmp_path, x, build, {"weight": normal(32, seed=3)})
    assert near(graph.onnx(**x), graph.torch(**x)) < 1e-6
    assert near(graph.onnx(**{**x, "sin": -x["sin"]}), graph.torch(**x)) > 1e-2


# Whole graphs

Steps = tuple[str | dict[str, Any], ...]
QUANTISED: Steps = ({"nvfp4_infer": {"weight_rule": "mse", "keep_steps": [0]}},)
FUSED: Steps = (
    "merge_qkv", "fuse_norm_rope", "nvfp4_cache", "fp8_infer", "fuse_rows",
    "fuse_attention_quantise",
)  # fmt: skip


def made(steps: Steps, external: bool = True) -> Program:
    """The program of some passes; if wanted, one that mutates nothing."""
    base = reached("stream", *PASSES["stream"][:6], head_dim=16, layers=2, height=64, width=96)
    return after(base, *steps, *(["externalise"] if external else []), "regionalise")


def compared(
    folder: Path, steps: Steps
) -> tuple[Program, Path, dict[str, list[tuple[Case, dict[str, float]]]]]:
    """A program, its models, and its golden cases: how far ONNX Runtime is from each output."""
    program = made(steps)
    models = written(program, folder)
    sessions = {name: OnnxGraph(models / f"{name}.onnx") for name in program.graphs}
    found: dict[str, list[tuple[Case, dict[str, float]]]] = {}
    for case in transformer_cases(made(steps, external=False), program):
        results = sessions[case.graph](given(case.inputs, program.contract(case.graph)))
        each = {name: distance(results[name], held) for name, held in case.outputs.items()}
        found.setdefault(case.graph, []).append((case, each))
    return program, models, found


def test_a_cache_in_nvfp4(tmp_path: Path) -> None:
    """Pages of bytes of 255, which are no numbers, are not listed in most cases."""
    _, _, found = compared(tmp_path, ("nvfp4_cache",))
    assert [len(found[graph]) for graph in ("prologue", "step", "commit")] == [1, 4, 4]
    for case, each in [*found["step"], *found["commit"]]:
        for name, far in each.items():
            bound = 1e-5 if case.outputs[name].dtype == torch.float32 else 0.01
            assert far <= bound, (case.graph, name, far)
    assert "new_k_pages_codes_1" in each and "new_v_pages_means_0" in each
    assert not any(case.spread for case, _ in found["step"])


def test_linears_in_w4a4(tmp_path: Path) -> None:
    """Steps within twice torch's own spread; passes in high precision as near as float32 is.

    Packed weights lie on the disk as the Program has them, for every target.
    """
    program, models, found = compared(tmp_path, QUANTISED)
    for case, each in found["step"]:
        assert each["sample"] <= max(1e-5, 2 * case.spread[torch.float32]) < 0.5
    assert all(each["sample"] < 1e-5 for _, each in found["step_high"])
    (case, _) = found["step"][-1]
    other = OnnxGraph(models / "step_high.onnx")(given(case.inputs, program.contract("step")))
    assert distance(other["sample"], case.outputs["sample"]) > 1e-2, "it is another graph"
    tensors, _ = read_tensors(models / "weights.safetensors")
    packed = [name for name in program.weights if is_packed([name])]
    assert len(packed) == 3 * 2 * 10 and not any(n + ".transposed" in tensors for n in packed)
    assert equal(tensors, {name: program.weights[name] for name in packed})


def test_fused_recipes_in_fp8(tmp_path: Path) -> None:
    """The passes of the 5B's fastest recipe."""
    _, _, found = compared(tmp_path, FUSED)
    for case, each in found["step"]:
        assert each["sample"] <= max(1e-5, 2 * case.spread[torch.float32]) < 0.5


def test_what_is_within_torchs_spread() -> None:
    """A graph that is a little wrong is not: its distances are usual, but all of them are large."""
    script = Path(__file__).parents[1] / "benchmarks" / "export_spread.py"
    within = runpy.run_path(str(script))["within"]
    own = [7e-7, 7e-7, 7e-7, 0.03, 0.04, 0.04, 0.05, 0.06, 0.08, 0.08, 0.09, 0.09]
    right = [4e-7, 4e-7, 4e-7, 4e-7, 5e-7, 0.03, 0.04, 0.07, 0.08, 0.08, 0.09, 0.1]
    wrong = [0.06, 0.07, 0.07, 0.07, 0.07, 0.07, 0.08, 0.08, 0.08, 0.08, 0.09, 0.09]
    assert within({"onnx_runtime": right, "torch": own})
    assert not within({"onnx_runtime": wrong, "torch": own})
    assert not within({"onnx_runtime": [*right[:2], *[0.2] * 10], "torch": own})
    assert within({"onnx_runtime": own[3:], "torch": own[3:]})


# On torch's own inputs


def streamed(program: Program) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pages that torch commits, of a stream's chunks 97 to 99, and its prompt's keys and values."""
    module = instantiate(program)
    contract = program.contract("prologue")
    prompt = dict(module("prologue", inputs(program, "prologue")))
    pages = {
        name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in program.pages.items()
    }
    contract = program.contract("commit")
    for slot in range(3):
        here = contract.named(places(program, range(slot), slot, 97 + slot))
        every = {**inputs(program, "commit", slot), **prompt, **pages, **here}
        module("commit", {name: every[name] for name in contract.inputs})
    assert all(page[:, :3].float().abs().amax() > 0 for page in pages.values())
    return pages, prompt


@pytest.mark.parametrize("steps", [(), ("nvfp4_cache",)])
@torch.no_grad()
def test_the_hundredth_chunk(tmp_path: Path, steps: Steps) -> None:
    original, external = made(steps, external=False), made(steps)
    pages, prompt = streamed(original)
    module, models = instantiate(original), written(external, tmp_path)
    here = places(original, (2, 0, 1), 3, 100)
    for graph in ("step", "commit"):
        contract = external.contract(graph)
        every = {**inputs(external, graph, 9), **pages, **prompt, **contract.named(here)}
        x = {name: every[name] for name in contract.inputs}
        wanted = run_external(partial(module, graph), original.contract(graph), x, here)
        found = OnnxGraph(models / f"{graph}.onnx")(x)
        for name in contract.outputs:
            bound = 1e-5 if wanted[name].dtype == torch.float32 else 0.01
            assert distance(found[name], wanted[name]) <= bound, (graph, name)
    elsewhere = {**x, **contract.named(places(original, (2, 0, 1), 3, 99))}
    assert near(OnnxGraph(models / "commit.onnx")(elsewhere), found) > 1e-3


@torch.no_grad()
def test_blocks_in_w4a4(tmp_path: Path) -> None:
    """Where no rounding flips, a block is as near as float32 is; that is so of most.

    A flip changes one of the L · K numbers that a product reads by a third of the largest at most,
    as from 4 to 6: for numbers of which the largest is p times their root mean square, that is
    p / (3 √(L · K)) of their norm. A product by random weights passes the share on, and a block
    adds its branches to what it was given. We allow three flips a block, with p = 5.
    """
    original = made(QUANTISED, external=False)
    pages, prompt = streamed(original)
    external = made(QUANTISED)
    region = external.regions["step_block"]
    graph = copy_graph(region.graph)
    output(graph).args = ({f"y{i}": node for i, node in enumerate(output(graph).args[0])},)
    alone = replace(external, graphs={"block": graph}, regions={}, weights={})
    session = OnnxGraph(written(alone, tmp_path) / "block.onnx")
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    module, seen = instantiate(external), []
    for owner, block in module.blocks_by_path.items():
        block.register_forward_hook(
            lambda _, given, results, owner=owner: seen.append((owner, given, results))
        )
    contract = external.contract("step")
    here = places(original, (2, 0, 1), 3, 100)
    for draw in range(8):
        every = {**inputs(external, "step", draw), **pages, **prompt, **contract.named(here)}
        module("step", {name: every[name] for name in contract.inputs})

    def farthest(values: list[Tensor], results: Sequence[Tensor]) -> float:
        found = session(dict(zip(names, values, strict=True)))
        pairs = [(found[f"y{i}"], theirs) for i, theirs in enumerate(results)]
        return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)

    far, length, width = [], 12, 32
    for owner, (name, *held), results in seen:
        assert name == "step_block"
        own = [external.weights[f"{owner}.{parameter}"] for parameter in region.parameters]
        far.append(farthest([*held, *own], results))
    assert len(far) == 16 and sum(each < 1e-5 for each in far) >= 12
    assert max(far) < 3 * 5 / (3 * (length * width) ** 0.5)
    assert farthest([1.01 * held[0], *held[1:], *own], results) > 1e-3, "it reads its inputs"
