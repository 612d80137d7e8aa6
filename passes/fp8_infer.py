"""Linear layers that infer in W8A8: FP8 weights and activations, a scale a row."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace as with_fields

from torch import Tensor, fx

from lltk.graph.edit import building, module_of, replace
from lltk.graph.linears import LinearChoice, chosen_linears
from lltk.graph.packed import FP8_ENDINGS, ROW_SCALES, pack_fp8
from lltk.graph.passes import Numerics, Pass, Report
from lltk.graph.program import Program, TensorSpec
from lltk.graph.stages import Stage
from lltk.ops.fp8_matmul.op import OVERLOAD as MATMUL
from lltk.ops.fp8_quantise.op import OVERLOAD as QUANTISE

MULTIPLE = 16
"""What tensor cores want K and N to be a multiple of."""


class Config(LinearChoice):
    """Which linears."""


class Fp8Infer(Pass[Config]):
    """Store weights in FP8 and multiply them with activations quantised as they come.

    ::

        linear(x, W, b)  →  fp8_matmul(*fp8_quantise(x), values, row scales, b)

    ``<module>.weight`` becomes ``<module>.weight_values`` and ``….weight_row_scales``. Linears that
    read the same x share its quantised values. Weights that are stored so already are taken as they
    are.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    leaves = Stage.QUANTISED
    kinds = ("stream", "score", "reference")
    numerics = Numerics.CHANGING

    _packed: Mapping[str, TensorSpec] = {}
    """Weights that were packed, as they were, by module."""

    def apply(self, program: Program, report: Report) -> None:
        chosen = [
            linear
            for graph in program.graphs.values()
            for linear in chosen_linears(program, graph, self.config, report, MULTIPLE)
        ]
        self._packed = {
            linear.module: TensorSpec.of(linear.weight.meta["val"]) for linear in chosen
        }
        program.weights = self.map_state(program.weights)
        program.model = with_fields(program.spec, keep_fp32=(*program.spec.keep_fp32, ROW_SCALES))
        quantised: dict[fx.Node, list[fx.Node]] = {}
        for linear in chosen:
            if linear.x not in quantised:
                with building(linear.node, module_of(linear.x)) as build:
                    made = build(QUANTISE, linear.x)
                    quantised[linear.x] = [build(operator.getitem, made, i) for i in range(2)]
            with building(linear.node) as build:
                weight = [build.attribute(linear.module + ending) for ending in FP8_ENDINGS]
                dtype = linear.node.meta["val"].dtype
                y = build(MATMUL, *quantised[linear.x], *weight, linear.bias, dtype)
                replace(linear.node, y)
            report.match(linear.kind(program))

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pack the chosen weights; packed ones stay as they are."""
        mapped: dict[str, Tensor] = {}
        for name, tensor in state.items():
            module = name.removesuffix(".weight")
            if name != f"{module}.weight" or module not in self._packed:
                mapped[name] = tensor
                continue
            names = [module + ending for ending in FP8_ENDINGS]
            mapped |= zip(names, pack_fp8(name, tensor), strict=True)
        return mapped

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values that the packed weights stand for, in their former dtype."""
        mapped = dict(state)
        for module, weight in self._packed.items():
            if f"{module}{FP8_ENDINGS[0]}" in mapped:
                values, scales = (mapped.pop(module + ending) for ending in FP8_ENDINGS)
                mapped[f"{module}.weight"] = (values.float() * scales).to(weight.dtype)
        return mapped
