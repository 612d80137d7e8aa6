"""Linear layers that infer in W4A4: NVFP4 weights and activations."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace as with_fields

import torch
from pydantic import Field
from torch import Tensor, fx

from lltk.graph.edit import Builder, building, module_of, replace
from lltk.graph.linears import Linear, LinearChoice, Rule, chosen_linears
from lltk.graph.packed import DECODE_SCALE, ENDINGS, packed_weights
from lltk.graph.passes import Numerics, Pass, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_matmul.op import OVERLOAD as MATMUL
from lltk.ops.nvfp4_quantise.op import OVERLOAD as QUANTISE
from lltk.ops.nvfp4_quantise.reference import BLOCK, nvfp4_quantise

aten = torch.ops.aten


class Config(LinearChoice):
    """Which linears, and how their operands are rounded."""

    activation_rule: Rule = Field("none", description="Four Over Six rule of activations")
    weight_rule: Rule = Field("none", description="Four Over Six rule of weights, as in training")


class Nvfp4Infer(Pass[Config]):
    """Store weights in NVFP4 and multiply them with activations quantised as they come.

    ::

        linear(x, W, b)  →  nvfp4_matmul(*nvfp4_quantise(x), codes, scales, decode scale) + b

    ``<module>.weight`` becomes ``<module>.weight_codes``, ``…_scales`` and ``…_decode_scale``, in
    16×16 tiles as training rounds it, K padded to whole blocks. Linears that read the same x share
    its quantised values. Weights that are stored so already are taken as they are.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    leaves = Stage.QUANTISED
    kinds = ("stream", "score", "reference")
    numerics = Numerics.CHANGING

    _shapes: Mapping[str, tuple[int, ...]] = {}
    """Of the weights that were packed, by module."""
    _dtypes: Mapping[str, torch.dtype] = {}

    def apply(self, program: Program, report: Report) -> None:
        shapes, dtypes = {}, {}
        linears = {
            name: list(chosen_linears(program, graph, self.config, report, BLOCK))
            for name, graph in program.graphs.items()
        }
        for chosen in linears.values():
            for linear in chosen:
                weight = linear.weight.meta["val"]
                shapes[linear.module] = tuple(weight.shape)
                dtypes[linear.module] = weight.dtype
        self._shapes, self._dtypes = shapes, dtypes
        program.weights = self.map_state(program.weights)
        kept = (*program.spec.keep_fp32, DECODE_SCALE)
        program.model = with_fields(program.spec, keep_fp32=kept)
        for chosen in linears.values():
            quantised: dict[fx.Node, list[fx.Node]] = {}
            for linear in chosen:
                if linear.x not in quantised:
                    with building(linear.node, module_of(linear.x)) as build:
                        made = build(QUANTISE, linear.x, 1, self.config.activation_rule)
                        quantised[linear.x] = [build(operator.getitem, made, i) for i in range(3)]
                with building(linear.node) as build:
                    replace(linear.node, _product(build, linear, quantised[linear.x]))
                report.match(linear.kind(program))

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pack the chosen weights; packed ones are checked."""
        mapped: dict[str, Tensor] = {}
        for name, tensor in state.items():
            module = name.removesuffix(".weight")
            if name == f"{module}.weight" and module in self._shapes:
                mapped |= self._pack(module, tensor)
            else:
                mapped[name] = tensor
        packed_weights(mapped, self.name)
        return mapped

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values that the packed weights stand for, in their former dtype."""
        mapped = dict(state)
        for module, (_, width) in self._shapes.items():
            if f"{module}{ENDINGS[0]}" in mapped:
                codes, scales, scale = (mapped.pop(module + ending) for ending in ENDINGS)
                values = nvfp4_dequantise(codes, scales, scale, self._dtypes[module])
                mapped[f"{module}.weight"] = values[:, :width].contiguous()
        return mapped

    def _pack(self, module: str, weight: Tensor) -> dict[str, Tensor]:
        if weight.is_meta:
            weight = torch.empty(weight.shape, device="meta")
            made = torch.ops.lltk.nvfp4_quantise(weight, BLOCK, self.config.weight_rule)
        else:
            made = nvfp4_quantise(weight, BLOCK, self.config.weight_rule)
            if bool(made[2].isnan()):
                raise ValueError(f"{module}.weight: is not finite; repair the checkpoint")
        return {module + ending: part for ending, part in zip(ENDINGS, made, strict=True)}


def _product(build: Builder, linear: Linear, x: list[fx.Node]) -> fx.Node:
    weight = [build.attribute(linear.module + ending) for ending in ENDINGS]
    y = build(MATMUL, *x, *weight, linear.node.meta["val"].dtype)
    return y if linear.bias is None else build(aten.add.Tensor, y, linear.bias)
