"""The score graph: one noisy clip, in which a chunk sees itself and earlier chunks."""

from __future__ import annotations

from lltk.graph.attention import find_attention
from lltk.graph.edit import building, replace
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

BLOCK_CAUSAL_ATTENTION = overload("block_causal_attention")


class Config(PassConfig):
    """Nothing to configure."""


class BlockCausal(Pass[Config]):
    """Let a chunk attend to itself and to earlier chunks.

    ::

        attend(q, k, v)  →  lltk.block_causal_attention(q, k, v, chunk tokens, False)
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    leaves = Stage.CAUSAL
    kinds = ("score",)
    numerics = Numerics.CHANGING

    def apply(self, program: Program, report: Report) -> None:
        rewrite_self_attention(program, "score", False, report)


def rewrite_self_attention(
    program: Program, name: str, teacher_forcing: bool, report: Report
) -> None:
    """Make every self-attention of the one graph block-causal, and give the graph a name.

    With teacher forcing the graph holds a clip twice, clean and noisy, as
    `block_causal_attention` has it.
    """
    (graph,) = program.graphs.values()
    chunk_tokens = program.geometry.chunk * program.geometry.frame_tokens(program.spec)
    for attention in find_attention(program, graph, program.spec.self_attention, report):
        with building(attention.node) as build:
            operands = (attention.q, attention.k, attention.v)
            out = build(BLOCK_CAUSAL_ATTENTION, *operands, chunk_tokens, teacher_forcing)
        replace(attention.result, out)
        report.match("self-attention")
    program.graphs = {name: graph}
