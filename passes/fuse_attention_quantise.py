"""Attention over pages in NVFP4 whose only reader quantises it, as one op with it."""

from __future__ import annotations

from typing import Any

import torch

from lltk.graph.edit import building, calls, module_of, prune, replace
from lltk.graph.match import read_once
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

    Follows `nvfp4_cache` and `fp8_infer`. Attention to text is not over pages, and stays.
    """

    Config = Config
    reads = (Stage.QUANTISED,)
    kinds = ("stream",)
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, QUANTISE):
                heads: Any = node.args[0]
                flat = read_once(heads, aten.flatten.using_ints) and heads.args[1:] == (2, 3)
                if not flat or not read_once(heads.args[0], ATTENTION):
                    report.miss(node, "quantises no attention over pages that it alone reads")
                    continue
                attention = heads.args[0]
                with building(node, module_of(attention)) as build:
                    replace(node, build(QUANTISE_ATTENTION, *attention.args))
                report.match("self-attention")
            prune(graph)
