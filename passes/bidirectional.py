"""The reference graph: one noisy clip, in which every frame sees every frame."""

from __future__ import annotations

from lltk.graph.attention import find_attention
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage


class Config(PassConfig):
    """Nothing to configure."""


class Bidirectional(Pass[Config]):
    """Keep the model's dense self-attention. Causal programs are measured against it.

    ::

        forward(…): attend(q, k, v)  →  reference(…): attend(q, k, v)
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    leaves = Stage.CAUSAL
    kinds = ("reference",)
    numerics = Numerics.BITWISE

    def apply(self, program: Program, report: Report) -> None:
        (graph,) = program.graphs.values()
        for _ in find_attention(program, graph, program.spec.self_attention, report):
            report.match("self-attention")
        program.graphs = {"reference": graph}
