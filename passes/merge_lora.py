"""Fold low-rank adapters into the weights they adapt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lltk.graph.edit import calls, replace
from lltk.graph.facts import Trainable
from lltk.graph.low_rank import LowRank, add_changes
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.passes.lora import Adapters, is_adapter

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure; the scale is that of the lora pass before."""


@dataclass(frozen=True)
class _MergedWeights:
    """The state map of adapters that are merged into the weights."""

    adapters: Adapters

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W → W + s·B·A; the adapters go."""
        merged = {}
        for name, tensor in state.items():
            if is_adapter(name):
                continue
            module = name.removesuffix(".weight")
            a, b = state.get(f"{module}.lora_A.weight"), state.get(f"{module}.lora_B.weight")
            if a is not None and b is not None:
                tensor = add_changes(tensor, [(LowRank(a, b, self.adapters.scale), 1.0)])
            merged[name] = tensor
        return merged

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The merged weights, with adapters that add nothing: the same function."""
        return self.adapters.map_state(state)


class MergeLora(Pass[Config]):
    """Undo lora's rewrite and add the adapters' product to the base weights.

    ::

        linear(x, W, b) + linear(linear(x, A), B) * s  →  linear(x, W + s·B·A, b)

    The product is summed in float32 and cast to the weight's dtype.
    """

    Config = Config
    reads = (Stage.CANONICAL, Stage.CAUSAL)
    numerics = Numerics.ROUNDING

    def requires(self, program: Program) -> None:
        if not program.fact(Adapters).modules:
            raise ValueError("there are no adapters; put lora before it in the recipe")

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, aten.add.Tensor):
                base = _adapted(node)
                if base is not None:
                    replace(node, base)
                    report.match("linears")
        program.change_weights(_MergedWeights(program.fact(Adapters)))
        program.leave(Adapters())
        program.leave(Trainable())


def _adapted(node: fx.Node) -> fx.Node | None:
    """The base linear of ``base + linear(linear(x, A), B) * s``; None for any other sum."""
    base, scaled = node.args[:2]
    if not (isinstance(scaled, fx.Node) and scaled.target is aten.mul.Tensor):
        return None
    up = scaled.args[0]
    if not (isinstance(up, fx.Node) and up.target is aten.linear.default):
        return None
    weight = up.args[1]
    found = isinstance(weight, fx.Node) and str(weight.target).endswith(".lora_B.weight")
    return base if found and isinstance(base, fx.Node) else None
