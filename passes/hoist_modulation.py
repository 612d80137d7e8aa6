"""The modulations of all blocks at once, before the blocks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lltk.graph.edit import (
    Builder,
    building,
    calls,
    module_of,
    prune,
    replace,
    shape,
    sort_topologically,
)
from lltk.graph.match import before_cast, is_call, operands, sole_reader
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure."""


class HoistModulation(Pass[Config]):
    """Add the tables of all blocks to a pass's modulation at once, before the blocks.

    ::

        in block i:  a, b, … = chunk(unsqueeze(table_i, 0) + to(modulation, f32), 6, 2)
                     unsqueeze(squeeze(a, 2), 2), unsqueeze(squeeze(b, 2) + 1, 2), …
            →  before all:  total = unsqueeze(stack([table_0, …]), 1) + to(modulation, f32)
                            a, b, … = slice(total, 3, 0, 1), slice(total, 3, 1, 2), …
                            select(a, 0, i), select(b + 1, 0, i), … for each block i

    So a pass launches these small kernels once, and not once a block. A table then belongs to no
    region, but keeps its name.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    kinds = ("stream",)
    numerics = Numerics.BITWISE

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            groups = defaultdict[Any, list[_Modulation]](list)
            for node in calls(graph, aten.chunk.default):
                if program.spec.layer_of(module_of(node)) is None:
                    continue
                found = _find(program, node)
                if found is None:
                    report.miss(node, "splits no sum of a block's table and a pass's modulation")
                    continue
                groups[found.shared].append(found)
            for group in groups.values():
                _hoist(program, group)
                report.match("blocks", len(group))
            sort_topologically(graph)
            prune(graph)


@dataclass(frozen=True)
class _Modulation:
    """A block's modulation.

    Attributes:
        chunk: the call that splits it.
        table: the block's parameter, [1, N, D].
        rows: the pass's modulation as the block adds it, [B, F, N, D].
        parts: what the block reads, by place among the N, each [B, F, D].
    """

    chunk: fx.Node
    table: fx.Node
    rows: fx.Node
    parts: dict[int, fx.Node]

    @property
    def shared(self) -> Any:
        """What is equal for blocks whose modulations can be one tensor."""
        dtypes = (self.rows.meta["val"].dtype, self.table.meta["val"].dtype)
        return before_cast(self.rows), shape(self.table), dtypes


def _find(program: Program, chunk: fx.Node) -> _Modulation | None:
    table, rows = operands(chunk.args[0], aten.add.Tensor)
    table = operands(table, aten.unsqueeze.default)[0]
    if not isinstance(table, fx.Node) or table.op != "get_attr" or len(shape(table)) != 3:
        return None
    outer = before_cast(rows)
    outside = isinstance(outer, fx.Node) and program.spec.layer_of(module_of(outer)) is None
    number = shape(table)[1]
    if not outside or len(shape(rows)) != 4 or chunk.args[1:] != (number, 2):
        return None
    parts = {}
    for each in chunk.users:
        part = sole_reader(each, aten.squeeze.dim)
        if part is None or part.args[1] != 2:
            return None
        parts[int(str(each.args[1]))] = part
    return _Modulation(chunk, table, rows, parts)


def _hoist(program: Program, group: list[_Modulation]) -> None:
    """Let blocks read parts of one tensor, which is computed before the first of them."""
    first = group[0]
    rows = before_cast(first.rows)
    with building(first.chunk, "") as build:
        tables = build(aten.stack.default, [each.table for each in group])
        if rows is not first.rows:
            rows = build(aten.to.dtype, rows, first.rows.meta["val"].dtype)
        total = build(aten.add.Tensor, build(aten.unsqueeze.default, tables, 1), rows)
        found = {
            place: build(aten.slice.Tensor, total, 3, place, place + 1)
            for place in sorted({place for each in group for place in each.parts})
        }
        raised = {place: build(aten.add.Tensor, part, 1) for place, part in found.items()}
        for index, each in enumerate(group):
            layer = program.spec.layer_of(module_of(each.chunk))
            for place, part in each.parts.items():
                name = f"modulation_{place}"
                for reader in list(part.users):
                    if is_call(reader, aten.add.Tensor) and reader.args[1:] == (1,):
                        own = (raised[place], 0, index)
                        row = build(aten.select.int, *own, name=f"{name}_plus_1_{layer}")
                        _give(build, row, reader)
                if part.users:
                    own = (found[place], 0, index)
                    _give(build, build(aten.select.int, *own, name=f"{name}_{layer}"), part)


def _give(build: Builder, row: fx.Node, part: fx.Node) -> None:
    """Let readers of a part, [B, F, D], read it as [B, F, 1, D], as most do."""
    for reader in list(part.users):
        if is_call(reader, aten.unsqueeze.default) and reader.args[1] == 2:
            replace(reader, row)
    if part.users:
        replace(part, build(aten.squeeze.dim, row, 2))
