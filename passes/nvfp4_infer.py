"""Inference of linear layers in W4A4: weights and activations are NVFP4."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from lltk.graph.contract import TensorSpec
from lltk.graph.edit import Builder, building, copy_graph, module_of, replace
from lltk.graph.facts import HighSteps, Trainable
from lltk.graph.linears import Linear, LinearChoice, Rule, chosen_linears
from lltk.graph.packed import ENDINGS, INPUT_SCALE
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
QUANTISE_CALIBRATED = overload("nvfp4_quantise_calibrated")

InputScale = Annotated[
    float, Field(ge=torch.finfo(torch.float32).tiny, le=torch.finfo(torch.float32).max)
]
"""A scale that float32 holds."""


class Config(LinearChoice):
    """Which linears, and how their operands are rounded."""

    activation_rule: Rule = Field("none", description="Four Over Six rule of activations")
    activation_scale: Literal["dynamic", "calibrated"] = Field(
        "dynamic",
        description="whether an activation's scale follows from its largest magnitude as it comes, "
        "or is a constant of input_scales, as `lltk calibrate` finds them",
    )
    input_scales: dict[str, InputScale] = Field(
        {}, description="calibrated scales, by the path of the module: largest magnitude / 2688"
    )
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
        scales: calibrated scales of activations, by the entry's name.
    """

    before: Mapping[str, TensorSpec]
    plain: frozenset[str]
    rule: Rule
    scales: Mapping[str, float]

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
        device = "meta" if any(weight.is_meta for weight in state.values()) else None
        return mapped | {
            name: torch.tensor(scale, device=device) for name, scale in self.scales.items()
        }

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode the packed weights, in the dtype that they had."""
        mapped = {name: value for name, value in state.items() if name not in self.scales}
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
    padded to whole blocks. Calibrated scales of activations are constants, ``<module>.input_scale``
    of the first of the linears that read an x::

        linear(x, W, b)  →  nvfp4_matmul(*nvfp4_quantise_calibrated(x, s), s, codes, …) + b

    Linears that read the same x share its quantised values. Weights that
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
        calibrated = self.config.activation_scale == "calibrated"
        if calibrated and self.config.activation_rule != "none":
            raise ValueError(
                "activation_scale: calibrated activations are rounded plainly; set "
                "activation_rule: none"
            )
        if calibrated and program.fact(Trainable).names:
            raise ValueError("activation_scale: adapters train with dynamic scales alone; use them")
        if calibrated != bool(self.config.input_scales):
            raise ValueError(
                "input_scales: goes with activation_scale: calibrated; find them with lltk "
                "calibrate, or remove both"
            )

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
        leaders = self._leaders(linears.values())
        scales = {
            f"{leader}.{INPUT_SCALE}": max(self.config.input_scales[each] for each in group)
            for leader, group in leaders.items()
        }
        program.change_weights(_Nvfp4Weights(before, kept, self.config.weight_rule, scales))
        trains = bool(program.fact(Trainable).names)
        for chosen in linears.values():
            quantised: dict[fx.Node, list[fx.Node]] = {}
            for linear in chosen:
                if linear.x in quantised:
                    pass
                elif scales:
                    leader = next(name for name, group in leaders.items() if linear.module in group)
                    with building(linear.node, module_of(linear.x)) as build:
                        scale = build.attribute(f"{leader}.{INPUT_SCALE}")
                        made = build(QUANTISE_CALIBRATED, linear.x, scale)
                        parts = [build(operator.getitem, made, i) for i in range(2)]
                        quantised[linear.x] = [*parts, scale]
                else:
                    with building(linear.node, module_of(linear.x)) as build:
                        x = build(aten.detach.default, linear.x) if trains else linear.x
                        made = build(QUANTISE, x, 1, self.config.activation_rule)
                        quantised[linear.x] = [build(operator.getitem, made, i) for i in range(3)]
                with building(linear.node) as build:
                    replace(linear.node, _product(build, linear, quantised[linear.x], trains))
                report.match(linear.kind(program))

    def _leaders(self, graphs: Iterable[Sequence[Linear]]) -> dict[str, list[str]]:
        """The linears that share an x, by the one whose name their scale has; none if dynamic."""
        if self.config.activation_scale == "dynamic":
            return {}
        groups: dict[str, list[str]] = {}
        for chosen in graphs:
            of_x: dict[fx.Node, list[str]] = {}
            for linear in chosen:
                of_x.setdefault(linear.x, []).append(linear.module)
            for group in of_x.values():
                known = next((each for each in groups.values() if set(each) & set(group)), None)
                if known is None:
                    groups[group[0]] = group
                else:
                    known += [module for module in group if module not in known]
        wanted = {module for group in groups.values() for module in group}
        if odd := sorted(wanted ^ self.config.input_scales.keys()):
            raise ValueError(
                f"input_scales: {odd[0]} has no scale; exclude it, or find scales of this recipe "
                "with lltk calibrate --script"
                if odd[0] in wanted
                else f"input_scales: {odd[0]} is no linear that becomes NVFP4; remove its scale, "
                "or find scales of this recipe with lltk calibrate --script"
            )
        return groups


def _product(build: Builder, linear: Linear, x: list[fx.Node], trains: bool) -> fx.Node:
    weight = [build.attribute(linear.module + ending) for ending in ENDINGS]
    dtype = linear.node.meta["val"].dtype
    y = build(*((FROZEN_LINEAR, linear.x) if trains else (MATMUL,)), *x, *weight, dtype)
    return y if linear.bias is None else build(aten.add.Tensor, y, linear.bias)
