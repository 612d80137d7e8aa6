"""GELUs whose only reader quantises them, as one op with it."""

from __future__ import annotations

from typing import Any

import torch

from lltk.graph.edit import building, calls, module_of, prune, replace
from lltk.graph.match import read_once
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.fp8_quantise.op import OVERLOAD as QUANTISE
from lltk.ops.fp8_quantise_gelu.op import OVERLOAD as QUANTISE_GELU

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure."""


class FuseGeluQuantise(Pass[Config]):
    """GELU and quantise activations to FP8 in one op.

    ::

        fp8_quantise(gelu(x, 'tanh'))  →  fp8_quantise_gelu(x)

    The bias stays with the product that makes x, which adds it before it rounds.
    """

    Config = Config
    reads = (Stage.QUANTISED,)
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, QUANTISE):
                gelu: Any = node.args[0]
                by_tanh = gelu.kwargs.get("approximate") == "tanh"
                if not by_tanh or not read_once(gelu, aten.gelu.default):
                    report.miss(node, "quantises no GELU by tanh that it alone reads")
                    continue
                with building(node, module_of(gelu)) as build:
                    replace(node, build(QUANTISE_GELU, gelu.args[0]))
                report.match("GELUs")
            prune(graph)
