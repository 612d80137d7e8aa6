"""A step of training in NVFP4 that this machine cannot take: its kernels, and its wiring at 5B."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from math import prod
from typing import Any

import pytest
import torch
from compiling import compiling_for
from helpers import PASSES, clips, make_program, make_recipe, tiny_config
from ranks import alike
from test_nvfp4_kernels import CONVERT, on_meta
from torch.utils._python_dispatch import TorchDispatchMode

from lltk.compiler import transform
from lltk.graph.edit import op_of, shape
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.graph.recipe import parse_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.models.configs import named_config
from lltk.ops.nvfp4_matmul import scaled_mm
from lltk.train.flow_matching import FlowMatching

cpu, manual = pytest.mark.cpu, pytest.mark.manual
RANKS = 4


# Kernels


def on_two(architecture: int, exchange: str) -> dict[str, list[str]]:
    """The PTX of the kernels of a rank's step, by name. No GPU of its architecture is needed."""
    steps: list[Any] = list(PASSES["train"])
    shared = {"balanced_sp": {"size": 2, "exchange": exchange}}
    lower = {"lower": {"prefer": ["triton"]}}
    steps[-2:] = [{"nvfp4_train": {"keep_last": 0.3}}, shared, "regionalise", lower]
    config = tiny_config(2, attention_head_dim=16)
    sizes = {"frames": 16, "text_tokens": 16}
    made = make_program(make_recipe("train", steps, config=config, dtype="bfloat16", **sizes))
    module = ProgramModule(made, torch.device("cpu"), None, {})  # kernels would be refused on a CPU
    with alike(), compiling_for(architecture) as found:
        objective = FlowMatching(made, module)
        objective.weights_changed()
        objective.loss(clips(made)).backward()
    return {name: [each.asm["ptx"] for each in kernels] for name, kernels in found.items()}


@cpu
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("exchange", ["fp8", "nvfp4"])
def test_every_kernel_of_a_step_compiles(exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("nvfp4_quantise", "row_pipeline", "nvfp4_quantise_transposed", "nvfp4_matmul"):
        monkeypatch.setattr(f"lltk.ops.{op}.triton.has_e2m1", lambda *given: True)
    found = on_two(100, exchange)
    sent = {"fp8": {"_write", "_dequantise"}, "nvfp4": {"_dequantise"}}[exchange]
    assert found.keys() == {"_largest", "_quantise", "_transpose", "_matmul"} | sent
    assert all(".target sm_100a" in ptx for kernels in found.values() for ptx in kernels)
    assert all("mxf4nvf4" in ptx for ptx in found["_matmul"]), "products are of codes"
    # To nearest by an instruction, and gradients stochastically by arithmetic.
    assert {CONVERT in ptx for ptx in found["_quantise"]} == {True, False}


# Wiring


class Seen(TorchDispatchMode):
    """Counts the ops of NVFP4 and of exchanges that run within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace == "lltk":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def of_5b(layers: int) -> Program:
    """The shipped recipe at 96 latent frames, for ranks that share a clip; on meta tensors."""
    shared = {"size": RANKS, "exchange": "nvfp4"}
    changes = [f"passes.balanced_sp.{key}={value}" for key, value in shared.items()]
    recipe = read_recipe(find_recipe("wan22_5b_train_nvfp4"), ["geometry.frames=96", *changes])
    recipe["model"]["config"] = named_config("wan22_5b") | {"num_layers": layers}
    program = transform(parse_recipe(recipe, "5B"), weights=False)
    for name, weight in program.weights.items():
        program.weights[name] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return program


def meta_step(program: Program) -> tuple[ProgramModule, Counter[str]]:
    """A forward and a backward pass of a rank, and the ops that ran."""
    module = ProgramModule(program, torch.device("meta"), None, {})
    module.recompute_blocks()
    inputs = program.contract("train").inputs.items()
    with alike(RANKS), Seen() as seen:
        given = {n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in inputs}
        result = module("train", given | module.quantised_weights())["sample"]
        assert result.shape == (1, 48, 96 // RANKS, 44, 80)
        result.float().square().mean().backward()
    return module, seen.count


def products(program: Program) -> set[tuple[int, int, int]]:
    """(M, N, K) of every product of NVFP4 operands, forward and backward."""
    found = set()
    for _, graph in program.every_graph():
        for node in graph.nodes:
            if op_of(node) is torch.ops.lltk.nvfp4_linear.default:
                x, weight = (shape(each) for each in node.args[:2])
                rows, (outer, inner) = prod(x[:-1]), weight
                found |= {(rows, outer, inner), (rows, inner, outer), (outer, inner, rows)}
    return found


@pytest.mark.parametrize(
    "layers", [pytest.param(3, marks=cpu), pytest.param(30, marks=manual)], ids=str
)
def test_the_5b_model_is_wired(layers: int) -> None:
    program = of_5b(layers)
    module, count = meta_step(program)
    assert all(parameter.grad is not None for parameter in module.parameters())
    converted = layers - -(-layers * 15 // 100)
    linears = 10 * converted
    # Each block runs twice, since it is computed again for the backward pass.
    assert count["nvfp4_linear_triton"] == 2 * linears
    assert count["nvfp4_matmul_triton"] == 2 * linears
    # Of seven inputs of linears, prompts are made outside of the blocks, once for all layers.
    activations = 2 * 6 * converted + 1
    assert count["nvfp4_largest_triton"] == activations + linears
    assert count["nvfp4_quantise_transposed_triton"] == activations + linears
    assert count["nvfp4_quantise_triton"] == activations + 2 * linears
    assert count["rounded_exchange_triton"] == layers * (2 * 2 + 2)
    shapes = products(program)
    assert len(shapes) == 8
    for rows, outer, inner in shapes:
        made = scaled_mm.nvfp4_matmul(*on_meta(rows, inner), *on_meta(outer, inner), torch.bfloat16)
        assert made.shape == (rows, outer)
