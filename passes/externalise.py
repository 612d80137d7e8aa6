"""Graphs that mutate nothing, for runtimes that only take inputs and give outputs."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from lltk.graph.contract import Role, page_output
from lltk.graph.edit import (
    add_input,
    building,
    calls,
    drop_unused_inputs,
    inputs_of,
    module_of,
    op_of,
    output,
    prune,
    replace,
    results_of,
)
from lltk.graph.facts import Ranks
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.graph.verify import is_mutation
from lltk.ops.implementations import overload

LISTED_ATTENTION = overload("listed_attention")
PAGED_ATTENTION = overload("paged_attention")
ROPE_TABLE = overload("rope_table")
WRITE_PAGE = overload("write_page")


class Config(PassConfig):
    """Nothing to configure."""


class Externalise(Pass[Config]):
    """Make everything that step and commit read an input, and all that they change an output.

    ::

        rope_table(positions, …)              →  inputs rotary_cos, rotary_sin
        paged_attention(q, k, v, …, table)    →  listed_attention(q, k, v, …, listed)
        write_page(k_pages_i, k, slot)        →  output new_k_pages_i: the page, [B, T, H, D]

    ``listed`` is bool [P], so that no shape depends on how many pages are listed. Whoever runs the
    graphs computes the rotary tables, in float64, and puts a commit's outputs into their page.
    Arenas that a graph only wrote are no inputs of it any more.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    kinds = ("stream",)
    numerics = Numerics.ROUNDING

    def requires(self, program: Program) -> None:
        if (ranks := program.fact(Ranks).count) > 1:
            raise ValueError(f"is for one process, the program is for {ranks}; remove what cuts it")

    def apply(self, program: Program, report: Report) -> None:
        for name, graph in program.graphs.items():
            _tables(graph, report)
            _list(graph, program.geometry.pages, report)
            _writes(graph, report)
            prune(graph)
            if name != "prologue":
                drop_unused_inputs(graph)

    def ensures(self, program: Program) -> None:
        internal = {Role.POSITIONS, Role.TABLE, Role.SLOT}
        for name, graph in program.every_graph():
            assert not any(is_mutation(node) for node in graph.nodes), f"{name} still mutates"
            roles = {node.meta.get("role") for node in graph.find_nodes(op="placeholder")}
            assert not roles & internal, f"{name} still reads {roles & internal}"


def _tables(graph: fx.Graph, report: Report) -> None:
    """Read rotary tables instead of computing them."""
    for node in calls(graph, ROPE_TABLE):
        parts = {int(str(user.args[1])): user for user in node.users}
        assert all(user.target is operator.getitem for user in parts.values())
        for index, role in ((0, Role.ROTARY_COS), (1, Role.ROTARY_SIN)):
            if index in parts:
                made = add_input(graph, str(role), node.meta["val"][index], role)
                replace(parts[index], made)
        graph.erase_node(node)
        report.match("rotary tables")


def _list(graph: fx.Graph, pages: int, report: Report) -> None:
    """Attend to all pages with a mask instead of to those of a table."""
    for table in inputs_of(graph, Role.TABLE):
        like: Tensor = torch.empty(pages, dtype=torch.bool, device="meta")
        listed = add_input(graph, "listed", like, Role.LISTED)
        for node in list(table.users):
            _only(PAGED_ATTENTION, node, "reads the table of pages")
            with building(node) as build:
                made = build(LISTED_ATTENTION, *node.args[:-1], listed)
            replace(node, made)
            report.match("attention")


def _writes(graph: fx.Graph, report: Report) -> None:
    """Give pages as outputs instead of writing them."""
    given = results_of(graph)
    for node in [node for node in graph.nodes if is_mutation(node)]:
        _only(WRITE_PAGE, node, "writes a page")
        arena, value, _ = node.args
        assert isinstance(arena, fx.Node) and isinstance(value, fx.Node)
        given[page_output(str(arena.target))] = value
        graph.erase_node(node)
        report.match("page")
    output(graph).args = (given,)


def _only(target: object, node: fx.Node, does: str) -> None:
    """Refuse a call that is none of ``target``."""
    if node.target is not target:
        raise ValueError(
            f"{node.name} ({module_of(node) or 'root'}): {op_of(node)} {does}, and has no form "
            f"without one; only {target} has: remove the pass that made it from the recipe"
        )
