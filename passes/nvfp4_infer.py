"""Inference of linear layers in W4A4: weights and activations are NVFP4."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, fx

from lltk.graph.contract import TensorSpec
from lltk.graph.edit import Builder, building, copy_graph, module_of, replace
from lltk.graph.facts import HighSteps, Trainable
from lltk.graph.linears import Linear, LinearChoice, Rule, chosen_linears
from lltk.graph.packed import ENDINGS
from lltk.graph.passes import Numerics, Pass, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.graph.verify import STEP_HIGH
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_quantise.reference import BLOCK, nvfp4_quantise

aten = torch.ops.aten
FROZEN_LINEAR = overload("nvfp4_frozen_linear")
MATMUL = overload("nvfp4_matmul")
QUANTISE = overload("nvfp4_quantise")


class Config(LinearChoice):
    """Which linears, and how their operands are rounded."""

    activation_rule: Rule = Field("none", description="Four Over Six rule of activations")
    weight_rule: Rule = Field("none", description="Four Over Six rule of weights, as in training")
    keep_steps: tuple[int, ...] = Field(
        (), description="denoising passes of a chunk, from 0, that stay in high precision"
    )
    keep_commit: bool = Field(False, description="whether the commit stays in high precision")


@dataclass(frozen=True)
class _Nvfp4Weights:
    """The state map of weights in NVFP4; weights in NVFP4 already stay as they are.

    Attributes:
        before: the weights as they were, by module.
        plain: the modules whose weights are read unpacked too.
        rule: the Four Over Six rule that they are packed by.
    """

    before: Mapping[str, TensorSpec]
    plain: frozenset[str]
    rule: Rule

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pack the weights."""
        mapped = dict(state)
        for module in self.before:
            name, packed = f"{module}.weight", module + ENDINGS[0] in state
            if name in mapped and not packed:
                mapped |= self._pack(module, mapped[name])
            if module not in self.plain:
                mapped.pop(name, None)
            elif packed and name not in mapped:
                raise ValueError(
                    f"{name}: keep_steps and keep_commit need it unpacked too; use a checkpoint "
                    "that is not quantised, or keep neither"
                )
        return mapped

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode the packed weights, in the dtype that they had."""
        mapped = dict(state)
        for module, weight in self.before.items():
            if module + ENDINGS[0] in mapped:
                codes, scales, scale = (mapped.pop(module + ending) for ending in ENDINGS)
                values = nvfp4_dequantise(codes, scales, scale, weight.dtype)[:, : weight.shape[1]]
                mapped.setdefault(f"{module}.weight", values.contiguous())
        return mapped

    def _pack(self, module: str, weight: Tensor) -> dict[str, Tensor]:
        if weight.is_meta:
            weight = torch.empty(weight.shape, device="meta")
            made = torch.ops.lltk.nvfp4_quantise(weight, BLOCK, self.rule)
        else:
            made = nvfp4_quantise(weight.to(self.before[module].dtype), BLOCK, self.rule)
            if bool(made[2].isnan()):
                raise ValueError(f"{module}.weight: is not finite; repair the checkpoint")
        return {module + ending: part for ending, part in zip(ENDINGS, made, strict=True)}


class Nvfp4Infer(Pass[Config]):
    """Store weights in NVFP4, and multiply them with activations quantised as they come.

    ::

        linear(x, W, b)  →  nvfp4_matmul(*nvfp4_quantise(x), codes, scales, decode scale) + b
        … adapters train →  nvfp4_frozen_linear(x, *nvfp4_quantise(detach(x)), codes, …) + b

    ``<module>.weight`` becomes ``<module>.weight_codes``, ``…_scales`` and ``…_decode_scale``. It
    is rounded as in training, in 16×16 tiles and from the dtype that it would run in, and K is
    padded to whole blocks. Linears that read the same x share its quantised values. Weights that
    are stored in NVFP4 already are taken as they are. Behind `lora`, gradients reach the adapters
    of layers before.

    Denoising passes that keep high precision run the graph ``step_high``, which is the step before
    this rewrite. The weights that it reads, or that a commit in high precision reads, stay beside
    the packed ones.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    leaves = Stage.QUANTISED
    kinds = ("stream", "score", "reference")
    numerics = Numerics.CHANGING

    def requires(self, program: Program) -> None:
        if (self.config.keep_steps or self.config.keep_commit) and program.kind != "stream":
            raise ValueError("keep_steps and keep_commit are for stream programs; remove them")

    def apply(self, program: Program, report: Report) -> None:
        linears = {
            name: list(chosen_linears(program, graph, self.config, report, BLOCK))
            for name, graph in program.graphs.items()
        }
        plain = set()
        if self.config.keep_commit:
            plain |= {linear.module for linear in linears.pop("commit")}
        if self.config.keep_steps:
            plain |= {linear.module for linear in linears["step"]}
            program.graphs[STEP_HIGH] = copy_graph(program.graphs["step"])
            program.leave(HighSteps(frozenset(self.config.keep_steps)))
        before = {
            linear.module: TensorSpec.of(linear.weight.meta["val"])
            for chosen in linears.values()
            for linear in chosen
        }
        kept = frozenset(plain & before.keys())
        program.change_weights(_Nvfp4Weights(before, kept, self.config.weight_rule))
        trains = bool(program.fact(Trainable).names)
        for chosen in linears.values():
            quantised: dict[fx.Node, list[fx.Node]] = {}
            for linear in chosen:
                if linear.x not in quantised:
                    with building(linear.node, module_of(linear.x)) as build:
                        x = build(aten.detach.default, linear.x) if trains else linear.x
                        made = build(QUANTISE, x, 1, self.config.activation_rule)
                        quantised[linear.x] = [build(operator.getitem, made, i) for i in range(3)]
                with building(linear.node) as build:
                    replace(linear.node, _product(build, linear, quantised[linear.x], trains))
                report.match(linear.kind(program))


def _product(build: Builder, linear: Linear, x: list[fx.Node], trains: bool) -> fx.Node:
    weight = [build.attribute(linear.module + ending) for ending in ENDINGS]
    dtype = linear.node.meta["val"].dtype
    y = build(*((FROZEN_LINEAR, linear.x) if trains else (MATMUL,)), *x, *weight, dtype)
    return y if linear.bias is None else build(aten.add.Tensor, y, linear.bias)
