"""Inference of linear layers in W8A8: weights and activations are FP8, with a scale a row."""

from __future__ import annotations

import operator

import torch
from torch import fx

from lltk.graph.contract import TensorSpec
from lltk.graph.edit import building, module_of, replace
from lltk.graph.facts import Trainable
from lltk.graph.linears import LinearChoice, chosen_linears
from lltk.graph.packed import FP8_ENDINGS, Fp8Weights
from lltk.graph.passes import Numerics, Pass, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

aten = torch.ops.aten
FROZEN_LINEAR = overload("fp8_frozen_linear")
MATMUL = overload("fp8_matmul")
ROW_PIPELINE = overload("row_pipeline")

MULTIPLE = 16
"""Tensor cores want K and N to be multiples of it."""


class Config(LinearChoice):
    """Which linears."""


class Fp8Infer(Pass[Config]):
    """Store weights in FP8, and multiply them with activations quantised as they come.

    ::

        linear(x, W, b)  →  fp8_matmul(*row_pipeline(x, to='fp8'), values, row scales, b)
        … adapters train →  fp8_frozen_linear(x, *row_pipeline(detach(x), to='fp8'), values, …)

    ``<module>.weight`` becomes ``<module>.weight_values`` and ``<module>.weight_row_scales``.
    Linears that read the same x share its quantised values. Weights that are stored in FP8 already
    are taken as they are. Behind `lora`, gradients reach the adapters of layers before.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    leaves = Stage.QUANTISED
    kinds = ("stream", "score", "reference")
    numerics = Numerics.CHANGING

    def apply(self, program: Program, report: Report) -> None:
        chosen = [
            linear
            for graph in program.graphs.values()
            for linear in chosen_linears(program, graph, self.config, report, MULTIPLE)
        ]
        before = {linear.module: TensorSpec.of(linear.weight.meta["val"]) for linear in chosen}
        program.change_weights(Fp8Weights(before))
        trains = bool(program.fact(Trainable).names)
        quantised: dict[fx.Node, list[fx.Node]] = {}
        for linear in chosen:
            if linear.x not in quantised:
                with building(linear.node, module_of(linear.x)) as build:
                    x = build(aten.detach.default, linear.x) if trains else linear.x
                    made = build(ROW_PIPELINE, x, to="fp8")
                    quantised[linear.x] = [build(operator.getitem, made, i) for i in range(2)]
            with building(linear.node) as build:
                weight = [build.attribute(linear.module + ending) for ending in FP8_ENDINGS]
                dtype = linear.node.meta["val"].dtype
                op = (FROZEN_LINEAR, linear.x) if trains else (MATMUL,)
                y = build(*op, *quantised[linear.x], *weight, linear.bias, dtype)
                replace(linear.node, y)
            report.match(linear.kind(program))
