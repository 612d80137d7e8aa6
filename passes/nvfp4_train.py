"""Training of linear layers in NVFP4."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from lltk.graph.contract import Role
from lltk.graph.edit import Builder, add_input, building, module_of, replace, shape
from lltk.graph.linears import Linear, LinearChoice, Rule, chosen_linears
from lltk.graph.passes import Numerics, Pass, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.graph.verify import WEIGHTS
from lltk.ops.hadamard.reference import SIGNS, random_signs
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_quantise.reference import BLOCK

aten = torch.ops.aten
LINEAR = overload("nvfp4_linear")
QUANTISE = overload("nvfp4_quantise")
QUANTISE_TRANSPOSED = overload("nvfp4_quantise_transposed")
TRANSPOSE = overload("nvfp4_transpose")
_STREAMS = 2
_PARTS = ("codes", "scales", "scale", "codes_t", "scales_t")


class Config(LinearChoice):
    """Which linears, and how their operands are quantised."""

    activation_rule: Rule = Field("none", description="Four Over Six rule of activations")
    weight_rule: Rule = Field("none", description="Four Over Six rule of weights")
    gradient_rule: Rule = Field("mse", description="Four Over Six rule of output gradients")
    stochastic: bool = Field(True, description="round output gradients stochastically")
    hadamard: Literal[0, 16, 32, 64] = Field(
        16, description="width of the Hadamard transform of dW's operands; 0 for none"
    )
    hadamard_seed: int | None = Field(
        None, description="seed of the transform's signs; null for the shared ones of width 16"
    )

    def signs(self) -> list[int]:
        """The transform's signs; empty for no transform."""
        if self.hadamard == len(SIGNS) and self.hadamard_seed is None:
            return list(SIGNS)
        return random_signs(self.hadamard, self.hadamard_seed or 0)


class Nvfp4Train(Pass[Config]):
    """Compute linears and their gradients as products of NVFP4 operands.

    ::

        linear(x, W, b)  →  x4   = nvfp4_quantise(x)
                            xt4  = nvfp4_quantise_transposed(x, signs)   kept for dW
                            nvfp4_linear(x, W, *x4, *xt4, *w4, …) + b

        graph ``weights``:  w4 = nvfp4_quantise(W, 16×16), nvfp4_transpose(w4)

    Linears that read the same x share its operands. W and b stay in their precision. The train
    graph reads W's 4-bit values as inputs, so that they are made only once in an optimiser step.
    """

    Config = Config
    reads = (Stage.CAUSAL,)
    leaves = Stage.QUANTISED
    kinds = ("train", "reference")
    numerics = Numerics.CHANGING

    def apply(self, program: Program, report: Report) -> None:
        (graph,) = program.graphs.values()
        chosen = list(chosen_linears(program, graph, self.config, report, BLOCK))
        if not chosen:
            return
        random = add_input(graph, "random", torch.empty(2, dtype=torch.int64), Role.RANDOM)
        weights = fx.Graph()
        made: dict[str, fx.Node] = {}
        operands: dict[fx.Node, tuple[fx.Node, ...]] = {}
        seeds: dict[int | None, fx.Node] = {}
        streams: Counter[int | None] = Counter()
        for linear in chosen:
            layer = program.spec.layer_of(linear.module)
            if linear.x not in operands:
                operands[linear.x] = self._activation(linear)
            if layer not in seeds:
                number = program.spec.layers if layer is None else layer
                with building(linear.node, "") as build:
                    seeds[layer] = build(aten.add.Scalar, random, number, name=f"random_{number}")
            names = _names(linear.kind(program), layer)
            values = self._weight(weights, linear)
            made |= dict(zip(names, values, strict=True))
            inputs = [
                add_input(graph, name, like, Role.WEIGHTS)
                for name, like in zip(names, _shapes(*shape(linear.weight)), strict=True)
            ]
            with building(linear.node) as build:
                y = build(
                    LINEAR,
                    linear.x,
                    linear.weight,
                    *operands[linear.x],
                    *inputs,
                    seeds[layer],
                    streams[layer],
                    self.config.stochastic,
                    self.config.gradient_rule,
                    self.config.signs(),
                )
                if linear.bias is not None:
                    y = build(aten.add.Tensor, y, linear.bias)
            streams[layer] += _STREAMS
            replace(linear.node, y)
            report.match(linear.kind(program))
        weights.output(made)
        program.graphs[WEIGHTS] = weights

    def _activation(self, linear: Linear) -> tuple[fx.Node, ...]:
        """x in NVFP4, and the transform of its transpose in NVFP4; made where x is made."""
        rule, signs = self.config.activation_rule, self.config.signs()
        with building(linear.node, module_of(linear.x)) as build:
            held = build(aten.detach.default, linear.x)
            return (
                *_parts(build, build(QUANTISE, held, 1, rule), 3),
                *_parts(build, build(QUANTISE_TRANSPOSED, held, signs, rule), 3),
            )

    def _weight(self, graph: fx.Graph, linear: Linear) -> tuple[fx.Node, ...]:
        """Add a weight's 4-bit values, and their transpose, to the end of a graph."""
        build = Builder(graph, linear.module)
        weight = build.attribute(str(linear.weight.target))
        quantised = build(QUANTISE, weight, BLOCK, self.config.weight_rule)
        codes, scales, scale = _parts(build, quantised, 3)
        return codes, scales, scale, *_parts(build, build(TRANSPOSE, codes, scales), 2)


def _parts(build: Builder, node: fx.Node, count: int) -> list[fx.Node]:
    """The results of a call that gives several."""
    return [build(operator.getitem, node, index) for index in range(count)]


def _names(kind: str, layer: int | None) -> list[str]:
    """Names for the parts of a weight: the path in its block, the part, and the layer."""
    suffix = "" if layer is None else f"_{layer}"
    return [f"{kind.replace('.', '_')}_{part}{suffix}" for part in _PARTS]


def _shapes(rows: int, width: int) -> list[Tensor]:
    """Meta tensors like the `_PARTS` of a weight [rows, width]."""
    down, across = -(-rows // BLOCK), -(-width // BLOCK)
    byte, eight = torch.uint8, torch.float8_e4m3fn
    sizes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((rows, across * BLOCK // 2), byte),
        ((rows, across), eight),
        ((), torch.float32),
        ((across * BLOCK, down * BLOCK // 2), byte),
        ((across * BLOCK, down), eight),
    ]
    return [torch.empty(size, dtype=dtype, device="meta") for size, dtype in sizes]
