"""Attention over pages in NVFP4 whose only reader quantises it, as one op with it."""

from __future__ import annotations

import torch

from lltk.graph.edit import building, calls, module_of, prune, replace
from lltk.graph.match import sole_reader
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.fp8_quantise.op import OVERLOAD as QUANTISE
from lltk.ops.fp8_quantise_attention.op import OVERLOAD as QUANTISE_ATTENTION
from lltk.ops.nvfp4_paged_attention.op import OVERLOAD as ATTENTION

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure."""


class FuseAttentionQuantise(Pass[Config]):
    """Attend to pages in NVFP4 and quantise the heads of a token to FP8 in one op.

    ::

        fp8_quantise(flatten(nvfp4_paged_attention(…), 2, 3))  →  fp8_quantise_attention(…)

    Follows `nvfp4_cache` and `fp8_infer`; `ulysses_stream`, which exchanges what attention gave,
    refuses it. Attention to text is not over pages, and stays.
    """

    Config = Config
    reads = (Stage.QUANTISED,)
    kinds = ("stream",)
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, ATTENTION):
                heads = sole_reader(node, aten.flatten.using_ints)
                quantise = heads and sole_reader(heads, QUANTISE)
                if heads is None or heads.args[1:] != (2, 3) or quantise is None:
                    report.miss(node, "is not read by fp8_quantise alone; run fp8_infer before")
                    continue
                with building(quantise, module_of(node)) as build:
                    replace(quantise, build(QUANTISE_ATTENTION, *node.args))
                report.match("self-attention")
            prune(graph)
