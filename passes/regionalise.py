"""One shared graph for the blocks of all layers."""

from __future__ import annotations

from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.regions import extract_regions
from lltk.graph.stages import Stage


class Config(PassConfig):
    """Nothing to configure."""


class Regionalise(Pass[Config]):
    """Cut every layer's nodes out and call one shared graph with the layer's parameters.

    ::

        … 30 × the block's nodes …  →  self['blocks.0']('step_block', x, …), …

    Equal blocks share a graph over all of a program's graphs; a shared graph returns what any of
    its users reads. Owners keep their parameters under diffusers' names.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED, Stage.PARTITIONED)
    leaves = Stage.REGIONAL
    numerics = Numerics.BITWISE

    def apply(self, program: Program, report: Report) -> None:
        for region, count in extract_regions(program).items():
            report.match(region, count)
