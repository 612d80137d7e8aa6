"""One shared graph for the blocks of all layers."""

from __future__ import annotations

from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.regions import extract_regions
from lltk.graph.stages import Stage


class Config(PassConfig):
    """Nothing to configure."""


class Regionalise(Pass[Config]):
    """Cut out every layer's nodes, and call a shared graph with the layer's parameters instead.

    ::

        … 30 × the block's nodes …  →  self['blocks.0']('step_block', x, …), …

    Equal blocks share one graph, also over several of the Program's graphs. The shared graph gives
    every value that is read from at least one of them. Parameters keep their names.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED, Stage.PARTITIONED)
    leaves = Stage.REGIONAL
    numerics = Numerics.BITWISE

    def apply(self, program: Program, report: Report) -> None:
        for region, count in extract_regions(program).items():
            report.match(region, count)
