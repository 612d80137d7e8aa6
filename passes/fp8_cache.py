"""A KV cache in FP8."""

from __future__ import annotations

import torch
from torch import fx

from lltk.graph.edit import calls
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.paged_attention.op import OVERLOAD as PAGED_ATTENTION
from lltk.ops.write_page.op import OVERLOAD as WRITE_PAGE


class Config(PassConfig):
    """Nothing to configure."""


class Fp8Cache(Pass[Config]):
    """Hold pages in E4M3, as they stand, saturating at ±448.

    ::

        k_pages_i: bf16[B, P, T, H, D]  →  k_pages_i: f8e4m3[B, P, T, H, D]

    Keys are normed and E4M3 has 15 binary orders of magnitude, so no scale is needed. The chunk in
    flight attends to its own keys and values as they are, unless `lower` names fp8_arena.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    leaves = Stage.QUANTISED
    kinds = ("stream",)
    numerics = Numerics.CHANGING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            arenas = [page for node in calls(graph, WRITE_PAGE) for page in node.args[:1]]
            for node in calls(graph, PAGED_ATTENTION):
                arenas += node.args[3:5]
            for pages in dict.fromkeys(arenas):
                assert isinstance(pages, fx.Node) and pages.op == "placeholder"
                pages.meta["val"] = pages.meta["val"].to(torch.float8_e4m3fn)
                report.match("pages")
