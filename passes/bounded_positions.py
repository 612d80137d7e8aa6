"""Keys are cached before RoPE, so that positions can be counted within the window."""

from __future__ import annotations

import operator

import torch
from torch import fx

from lltk.graph.attention import paged_op
from lltk.graph.contract import Role
from lltk.graph.edit import (
    Builder,
    add_input,
    building,
    calls,
    input_of,
    module_of,
    op_of,
    replace,
    shape,
)
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.rotary import Rotation, find_rotation, rotate
from lltk.graph.stages import Stage
from lltk.graph.verify import is_mutation
from lltk.ops.implementations import overload

aten = torch.ops.aten
DECODE_PAGES = overload("nvfp4_decode_pages")
NVFP4_PAGED_ATTENTION = overload("nvfp4_paged_attention")
PAGED_ATTENTION = overload("paged_attention")
ROPE_TABLE = overload("rope_table")


class Config(PassConfig):
    """Nothing to configure."""


class BoundedPositions(Pass[Config]):
    """Cache keys before RoPE, and turn them by positions of the moment whenever they are read.

    ::

        write_page(k_pages_i, rotate(k), slot)  →  write_page(k_pages_i, k, slot)
        paged_attention(q, rotate(k), v, k_pages_i, v_pages_i, table)
            →  paged_attention(q, rotate(k), v, rotate(k_pages_i), v_pages_i, table)

    Pages in NVFP4 are decoded first, all of them::

        nvfp4_paged_attention(q, rotate(k), v, k_pages_codes_i, …, v_pages_codes_i, …, table)
            →  paged_attention(q, rotate(k), v, rotate(nvfp4_decode_pages(k_pages_codes_i, …)),
                               nvfp4_decode_pages(v_pages_codes_i, …), table)

    ``page_positions`` are the positions of the frames of all pages, float64 [P · F]. A session
    counts them as `lltk.stream.positions.bounded_positions` does, so that they stay as small as the
    window. With the positions at which the chunks were committed, and pages in the compute dtype,
    results are those without this pass, bit for bit.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    kinds = ("stream",)
    numerics = Numerics.CHANGING

    def requires(self, program: Program) -> None:
        if not any(calls(graph, ROPE_TABLE) for graph in program.graphs.values()):
            raise ValueError(
                "nothing computes rotary tables from positions; put frame_positions before it in "
                "the recipe"
            )

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            rotations = _rotations(graph)
            reading = [node for node in graph.nodes if paged_op(node)]
            for node in reading:
                _check(node, rotations)
            if reading:
                cos, sin = _page_tables(program, graph)
            for node in reading:
                with building(node) as build:
                    replace(node, _attention(build, node, cos, sin))
                report.match("self-attention")
            for node in [node for node in graph.nodes if is_mutation(node)]:
                for key in rotations.keys() & set(node.all_input_nodes):
                    node.replace_input_with(key, rotations[key].heads)
                    report.match("pages of keys")

    def ensures(self, program: Program) -> None:
        for name, graph in program.graphs.items():
            rotations = _rotations(graph)
            writing = [node for node in graph.nodes if is_mutation(node)]
            left = [node for node in writing if rotations.keys() & set(node.all_input_nodes)]
            assert not left, f"{name}: {left} still write keys that are turned"


def _rotations(graph: fx.Graph) -> dict[fx.Node, Rotation]:
    """The rotations of a graph, by their results."""
    found = (find_rotation(stack) for stack in calls(graph, aten.stack.default))
    return {rotation.turned: rotation for rotation in found if rotation is not None}


def _check(node: fx.Node, rotations: dict[fx.Node, Rotation]) -> None:
    """Refuse attention whose keys are turned in a way that pages cannot be."""
    if op_of(node) not in (PAGED_ATTENTION, NVFP4_PAGED_ATTENTION):
        raise ValueError(
            f"{node.name} ({module_of(node)}): {op_of(node)} reads pages by itself; remove the "
            "pass that made it from the recipe"
        )
    if node.args[1] not in rotations:
        raise ValueError(
            f"{node.name} ({module_of(node)}): its keys are not seen to be turned by a table of "
            "positions; move bounded_positions before the pass that changed that, such as "
            "fuse_norm_rope"
        )


def _page_tables(program: Program, graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
    """Cos and sin of all pages' tokens, from an input of the pages' positions."""
    (table,) = calls(graph, ROPE_TABLE)
    positions = input_of(graph, Role.POSITIONS)
    count = program.geometry.pages * shape(positions)[0]
    like = torch.empty(count, dtype=torch.float64, device="meta")
    given = add_input(graph, str(Role.PAGE_POSITIONS), like, Role.PAGE_POSITIONS)
    with building(table) as build:
        tables = build(ROPE_TABLE, given, *table.args[1:])
        cos = build(operator.getitem, tables, 0, name="page_cos")
        sin = build(operator.getitem, tables, 1, name="page_sin")
    return cos, sin


def _attention(build: Builder, node: fx.Node, cos: fx.Node, sin: fx.Node) -> fx.Node:
    """What attends as a node does, to pages whose keys are turned when they are read."""
    q, k, v, *arenas, table = node.args
    if op_of(node) is PAGED_ATTENTION:
        keys, values = arenas
        assert isinstance(keys, fx.Node)
        sizes, dtype = shape(keys), keys.meta["val"].dtype
    else:
        keys, values = (build(DECODE_PAGES, *part) for part in (arenas[:4], arenas[4:]))
        assert isinstance(arenas[0], fx.Node)
        *page, half = shape(arenas[0])
        sizes, dtype = (*page, 2 * half), torch.float32
    tokens = build(aten.flatten.using_ints, keys, 1, 2)
    turned = rotate(build, tokens, cos, sin, dtype)
    pages = build(aten.unflatten.int, turned, 1, list(sizes[1:3]))
    return build(PAGED_ATTENTION, q, k, v, pages, values, table)
