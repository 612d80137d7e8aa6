"""Attention over pages in NVFP4 and the quantising of its result, as one op."""

from __future__ import annotations

import torch

from lltk.graph.edit import building, calls, module_of, prune, replace
from lltk.graph.match import sole_reader
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

aten = torch.ops.aten
QUANTISE_ATTENTION = overload("fp8_quantise_attention")
ATTENTION = overload("nvfp4_paged_attention")
ROW_PIPELINE = overload("row_pipeline")


class Config(PassConfig):
    """Nothing to configure."""


class FuseAttentionQuantise(Pass[Config]):
    """Attend to pages in NVFP4, and quantise all heads of a token to FP8, in one op.

    ::

        row_pipeline(flatten(nvfp4_paged_attention(…), 2, 3), to='fp8')
            →  fp8_quantise_attention(…)

    Runs after `nvfp4_cache` and `fp8_infer`. `ulysses_stream` exchanges what attention gives before
    it is quantised, so it refuses a program in which this pass has run. Attention to text reads no
    pages and stays as it is.
    """

    Config = Config
    reads = (Stage.QUANTISED,)
    kinds = ("stream",)
    numerics = Numerics.ROUNDING

    def requires(self, program: Program) -> None:
        if program.turns_pages:
            raise ValueError(
                "pages are turned before attention reads them, so no kernel reads them in NVFP4; "
                "remove it, or bounded_positions, from the recipe's passes"
            )

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, ATTENTION):
                heads = sole_reader(node, aten.flatten.using_ints)
                quantise = heads and sole_reader(heads, ROW_PIPELINE)
                whole = heads is not None and heads.args[1:] == (2, 3)
                if not whole or quantise is None or quantise.kwargs != {"to": "fp8"}:
                    report.miss(
                        node, "is not read by a quantiser to FP8 alone; run fp8_infer before"
                    )
                    continue
                with building(quantise, module_of(node)) as build:
                    replace(quantise, build(QUANTISE_ATTENTION, *node.args))
                report.match("self-attention")
            prune(graph)
