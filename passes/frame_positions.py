"""RoPE at given frame positions instead of a table's first rows."""

from __future__ import annotations

import operator

import torch
from torch import fx

from lltk.graph.contract import Role
from lltk.graph.edit import add_input, building, input_of, module_of, prune, replace, shape
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

ROPE_TABLE = overload("rope_table")


class Config(PassConfig):
    """Nothing to configure."""


class FramePositions(Pass[Config]):
    """Compute the rotary tables from an input of frame positions.

    ::

        cos = reshape(cat(the model's table[:F], …))  →  cos, sin = lltk.rope_table(positions, …)

    Positions are float64 [F]. They are absolute, may be of any size, and may be fractional. For 0,
    1, …, F-1 the tables have the same bits as diffusers' own.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    numerics = Numerics.BITWISE

    def apply(self, program: Program, report: Report) -> None:
        spec = program.spec
        height, width = program.geometry.grid(spec)
        for graph in program.graphs.values():
            found = [_table(graph, spec.rope, name, report) for name in spec.rope_tables]
            if None in found:
                continue
            frames = shape(input_of(graph, Role.LATENTS))[2]
            like = torch.empty(frames, dtype=torch.float64, device="meta")
            positions = add_input(graph, "positions", like, Role.POSITIONS)
            first = next(node for node in graph.nodes if node in found)
            with building(first, spec.rope) as build:
                split = list(spec.rope_split)
                tables = build(ROPE_TABLE, positions, height, width, split, spec.rope_theta)
                cos = build(operator.getitem, tables, 0, name="rope_cos")
                sin = build(operator.getitem, tables, 1, name="rope_sin")
            for old, new in zip(found, (cos, sin), strict=True):
                assert old is not None
                replace(old, new)
            report.match("tables", 2)
            prune(graph)
        read = {n.target for g in program.graphs.values() for n in g.find_nodes(op="get_attr")}
        for name in set(spec.rope_tables) - read:
            del program.constants[name]

    def ensures(self, program: Program) -> None:
        assert not set(program.spec.rope_tables) & program.constants.keys()


def _table(graph: fx.Graph, rope: str, buffer: str, report: Report) -> fx.Node | None:
    """The one value that follows from a buffer of the RoPE module and is read outside of it."""
    reached = {n for n in graph.find_nodes(op="get_attr") if n.target == buffer}
    leaving = []
    for node in graph.nodes:
        if reached & set(node.all_input_nodes) and module_of(node) == rope:
            reached.add(node)
            if any(module_of(user) != rope for user in node.users):
                leaving.append(node)
    if len(leaving) == 1:
        return leaving[0]
    for node in leaving or list(graph.nodes)[:1]:
        report.miss(node, f"{len(leaving)} values of {rope} derive from {buffer}, not one")
    return None
