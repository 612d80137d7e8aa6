"""Graphs that mutate nothing, for runtimes that only take inputs and give outputs."""

from __future__ import annotations

import operator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from lltk.graph.contract import Role, page_output
from lltk.graph.edit import (
    Builder,
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

aten = torch.ops.aten
DECODE_PAGES = overload("nvfp4_decode_pages")
FP8_QUANTISE_ATTENTION = overload("fp8_quantise_attention")
LISTED_ATTENTION = overload("listed_attention")
NVFP4_LISTED_ATTENTION = overload("nvfp4_listed_attention")
NVFP4_PAGED_ATTENTION = overload("nvfp4_paged_attention")
NVFP4_WRITE_PAGE = overload("nvfp4_write_page")
PAGED_ATTENTION = overload("paged_attention")
QUANTISE_PAGE = overload("nvfp4_quantise_page")
ROPE_TABLE = overload("rope_table")
ROW_PIPELINE = overload("row_pipeline")
WRITE_PAGE = overload("write_page")


class Config(PassConfig):
    """What attention reads of pages in NVFP4."""

    pages: Literal["decoded", "stored"] = Field(
        "decoded",
        description="whether attention reads NVFP4 pages decoded, or as they are stored, which is "
        "for a kernel that decodes those that it reads",
    )


class Externalise(Pass[Config]):
    """Make everything that step and commit read an input, and all that they change an output.

    ::

        rope_table(positions, …)              →  inputs rotary_cos, rotary_sin
        paged_attention(q, k, v, …, table)    →  listed_attention(q, k, v, …, listed)
        write_page(k_pages_i, k, slot)        →  output new_k_pages_i: the page, [B, T, H, D]

    Pages in NVFP4 are decoded before attention, and a new one is an output a part::

        nvfp4_paged_attention(q, k, v, …, table)
            →  listed_attention(q, k, v, nvfp4_decode_pages(…), nvfp4_decode_pages(…), listed)
        fp8_quantise_attention(…)  →  row_pipeline(flatten(the same, 2, 3), to='fp8')
        nvfp4_write_page(k_pages_codes_i, …, k, slot, rule)
            →  outputs new_k_pages_codes_i, …: the parts of nvfp4_quantise_page(k, …)

    Where attention is to read them as they are stored, that is one op::

        nvfp4_paged_attention(q, k, v, …, table)  →  nvfp4_listed_attention(q, k, v, …, listed)

    ``listed`` is bool [P], so that no shape depends on how many pages are listed. Whoever runs the
    graphs computes the rotary tables, in float64, and puts a commit's outputs into their page.
    Arenas that a graph only wrote are no inputs of it any more.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED, Stage.PARTITIONED)
    kinds = ("stream",)
    numerics = Numerics.ROUNDING

    def requires(self, program: Program) -> None:
        if program.turns_pages:
            raise ValueError(
                "exported graphs are given the positions of the chunk in flight alone, not those "
                "of pages; remove bounded_positions from the recipe's passes"
            )
        if any(spec.role is Role.PAGE_DECODED for spec in program.pages.values()):
            raise ValueError(
                "pages of exported graphs are not kept decoded; remove keep_decoded of "
                "fuse_attention_quantise from the recipe's passes"
            )
        if (ranks := program.fact(Ranks).count) > 1:
            raise ValueError(f"is for one process, the program is for {ranks}; remove what cuts it")

    def apply(self, program: Program, report: Report) -> None:
        for name, graph in program.graphs.items():
            _tables(graph, report)
            _list(graph, program.geometry.pages, self.config.pages == "stored", report)
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


def _list(graph: fx.Graph, pages: int, stored: bool, report: Report) -> None:
    """Attend to all pages with a mask instead of to those of a table."""
    for table in inputs_of(graph, Role.TABLE):
        like: Tensor = torch.empty(pages, dtype=torch.bool, device="meta")
        listed = add_input(graph, "listed", like, Role.LISTED)
        for node in list(table.users):
            with building(node) as build:
                made = _attention(build, node, listed, stored)
            replace(node, made)
            report.match("attention")


def _attention(build: Builder, node: fx.Node, listed: fx.Node, stored: bool) -> fx.Node:
    """What attends as a node does, to the pages of a mask."""
    if node.target is PAGED_ATTENTION:
        return build(LISTED_ATTENTION, *node.args[:-1], listed)
    if node.target not in (NVFP4_PAGED_ATTENTION, FP8_QUANTISE_ATTENTION):
        raise ValueError(_refusal(node, "reads the table of pages"))
    if stored:
        made = build(NVFP4_LISTED_ATTENTION, *node.args[:-1], listed)
    else:
        q, k, v, *arenas, _ = node.args
        keys, values = build(DECODE_PAGES, *arenas[:4]), build(DECODE_PAGES, *arenas[4:])
        made = build(LISTED_ATTENTION, q, k, v, keys, values, listed)
    if node.target is NVFP4_PAGED_ATTENTION:
        return made
    return build(ROW_PIPELINE, build(aten.flatten.using_ints, made, 2, 3), to="fp8")


def _writes(graph: fx.Graph, report: Report) -> None:
    """Give pages as outputs instead of writing them."""
    given = results_of(graph)
    for node in [node for node in graph.nodes if is_mutation(node)]:
        given |= _page(node)
        graph.erase_node(node)
        report.match("page")
    output(graph).args = (given,)


def _page(node: fx.Node) -> dict[str, fx.Node]:
    """The outputs in the place of a write."""
    if node.target is WRITE_PAGE:
        arena, value, _ = node.args
        assert isinstance(arena, fx.Node) and isinstance(value, fx.Node)
        return {page_output(str(arena.target)): value}
    if node.target is not NVFP4_WRITE_PAGE:
        raise ValueError(_refusal(node, "writes a page"))
    *parts, value, _, rule = node.args
    arenas = [part for part in parts if isinstance(part, fx.Node)]
    with building(node) as build:
        page = build(QUANTISE_PAGE, value, len(arenas) == len(parts), rule)
        made = [build(operator.getitem, page, index) for index in range(len(arenas))]
    names = (page_output(str(arena.target)) for arena in arenas)
    return dict(zip(names, made, strict=True))


def _refusal(node: fx.Node, does: str) -> str:
    return (
        f"{node.name} ({module_of(node) or 'root'}): {op_of(node)} {does}, and has no form without "
        "one; remove the pass that made it from the recipe"
    )
