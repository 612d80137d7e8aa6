"""Fold low-rank adapters into the weights they adapt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from lltk.graph.edit import calls, replace
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.passes.lora import Lora, is_adapter

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure: the scale is read from the lora pass before it."""


class MergeLora(Pass[Config]):
    """Undo lora's rewrite and add the adapters' product to the base weights.

    ::

        linear(x, W, b) + linear(linear(x, A), B) * s  →  linear(x, W + s·B·A, b)

    The product is summed in float32 and cast to the weight's dtype.
    """

    Config = Config
    reads = (Stage.CANONICAL, Stage.CAUSAL)
    numerics = Numerics.ROUNDING

    _lora: Lora | None = None

    def requires(self, program: Program) -> None:
        self._lora = next((p for p in reversed(program.passes) if isinstance(p, Lora)), None)
        if self._lora is None:
            raise ValueError("there are no adapters; put lora before it in the recipe")

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, aten.add.Tensor):
                base = _adapted(node)
                if base is not None:
                    replace(node, base)
                    report.match("linears")
        program.weights = self.map_state(program.weights)
        program.trainable = None

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W → W + s·B·A; adapters go."""
        assert self._lora is not None
        scale = self._lora.config.alpha / self._lora.config.rank
        merged = {}
        for name, tensor in state.items():
            if is_adapter(name):
                continue
            module = name.removesuffix(".weight")
            a, b = state.get(f"{module}.lora_A.weight"), state.get(f"{module}.lora_B.weight")
            if a is not None and b is not None:
                tensor = (tensor.float() + scale * (b.float() @ a.float())).to(tensor.dtype)
            merged[name] = tensor
        return merged

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The merged weights as base, with adapters that add nothing: the same function."""
        assert self._lora is not None
        return self._lora.map_state(state)


def _adapted(node: fx.Node) -> fx.Node | None:
    """The base linear of ``base + linear(linear(x, A), B) * s``."""
    base, scaled = node.args[:2]
    if not (isinstance(scaled, fx.Node) and scaled.target is aten.mul.Tensor):
        return None
    up = scaled.args[0]
    if not (isinstance(up, fx.Node) and up.target is aten.linear.default):
        return None
    weight = up.args[1]
    found = isinstance(weight, fx.Node) and str(weight.target).endswith(".lora_B.weight")
    return base if found and isinstance(base, fx.Node) else None
