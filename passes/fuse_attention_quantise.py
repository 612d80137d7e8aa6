"""Attention over pages in NVFP4 and the quantising of its result, as one op."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import fx

from lltk.graph.contract import Role
from lltk.graph.edit import (
    add_input,
    building,
    calls,
    drop_unused_inputs,
    module_of,
    prune,
    replace,
)
from lltk.graph.match import read_once, sole_reader
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

aten = torch.ops.aten
QUANTISE_ATTENTION = overload("fp8_quantise_attention")
ATTENTION = overload("nvfp4_paged_attention")
DECODE_PAGE = overload("fp8_decode_page")
NORM_ROPE = overload("rms_norm_rope")
ROW_PIPELINE = overload("row_pipeline")
WRITE_PAGE = overload("nvfp4_write_page")


class Config(PassConfig):
    """What is kept between passes."""

    keep_decoded: bool = Field(
        False,
        description="whether pages are kept decoded to E4M3 too, a byte an element, so that only a "
        "commit decodes, and that one page alone; queries are rounded as they are rotated",
    )


class FuseAttentionQuantise(Pass[Config]):
    """Attend to pages in NVFP4, and quantise all heads of a token to FP8, in one op.

    ::

        row_pipeline(flatten(nvfp4_paged_attention(…), 2, 3), to='fp8')
            →  fp8_quantise_attention(…)

    With ``keep_decoded`` it also does this, and lets the op read k_pages_decoded_i,
    k_pages_largest_i, v_pages_decoded_i and v_pages_largest_i. Attention reads the same bits, in
    another order::

        nvfp4_write_page(k_pages_codes_i, …, k, slot, rule)
            →  the same, and fp8_decode_page(k_pages_decoded_i, k_pages_largest_i,
                                             k_pages_codes_i, …, slot)
        rms_norm_rope(q, …)  →  rms_norm_rope(q, …, to='e4m3')

    Pages are decoded less the means of page 0, which therefore has to stay: there must be a sink,
    and ``smoothing`` in the cache.

    Runs after `nvfp4_cache` and `fp8_infer`. `ulysses_stream` exchanges what attention gives before
    it is quantised, so it refuses a program in which this pass has run. Attention to text reads no
    pages and stays as it is.
    """

    Config = Config
    reads = (Stage.QUANTISED,)
    kinds = ("stream",)
    numerics = Numerics.ROUNDING

    def requires(self, program: Program) -> None:
        if program.turns_pages:
            raise ValueError(
                "pages are turned before attention reads them, so no kernel reads them in NVFP4; "
                "remove it, or bounded_positions, from the recipe's passes"
            )

        if self.config.keep_decoded and not program.geometry.sink:
            raise ValueError(
                "keep_decoded needs a page that stays, and there is no sink; set geometry.sink, or "
                "remove keep_decoded"
            )

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            kept = _keep_decoded(graph, report) if self.config.keep_decoded else {}
            for node in calls(graph, ATTENTION):
                heads = sole_reader(node, aten.flatten.using_ints)
                quantise = heads and sole_reader(heads, ROW_PIPELINE)
                whole = heads is not None and heads.args[1:] == (2, 3)
                if not whole or quantise is None or quantise.kwargs != {"to": "fp8"}:
                    report.miss(
                        node, "is not read by a quantiser to FP8 alone; run fp8_infer before"
                    )
                    continue
                q, *rest = node.args
                if self.config.keep_decoded:
                    q, rest = _rounded(q), [*rest, *_decoded(node, kept)]
                with building(quantise, module_of(node)) as build:
                    replace(quantise, build(QUANTISE_ATTENTION, q, *rest))
                report.match("self-attention")
            prune(graph)
            drop_unused_inputs(graph)


def _keep_decoded(graph: fx.Graph, report: Report) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """Decode each page as it is written.

    Returns:
        The inputs that hold decoded pages and their largest magnitudes, by the codes' input.
    """
    kept: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in calls(graph, WRITE_PAGE):
        *arena, _, slot, _ = node.args
        with building(node.next, module_of(node)) as build:
            build(DECODE_PAGE, *_inputs(arena[0], kept), *arena, slot)
        report.match("pages that are kept decoded")
    return kept


def _decoded(node: fx.Node, kept: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> list[fx.Node]:
    """What an attention reads of the pages that are kept decoded."""
    k_codes, _, _, k_means, v_codes, *_ = node.args[3:]
    if k_means is None:
        raise ValueError(
            "keep_decoded subtracts means, and pages have none; remove it, or smoothing: false of "
            "nvfp4_cache"
        )
    return [*_inputs(k_codes, kept), *_inputs(v_codes, kept)]


def _inputs(codes: Any, kept: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, fx.Node]:
    """The inputs beside an arena's codes: its pages decoded, and their largest magnitudes."""
    if codes not in kept:
        like = codes.meta["val"]
        *page, half = like.shape
        made = {
            Role.PAGE_DECODED: like.new_empty((*page, 2 * half), dtype=torch.float8_e4m3fn),
            Role.PAGE_LARGEST: like.new_empty(page[:2], dtype=torch.float32),
        }
        name, _, layer = str(codes.target).rpartition("_codes_")
        decoded, largest = (
            add_input(codes.graph, f"{name}_{role.removeprefix('page_')}_{layer}", each, role)
            for role, each in made.items()
        )
        kept[codes] = decoded, largest
    return kept[codes]


def _rounded(q: Any) -> fx.Node:
    """Queries in E4M3 where one op makes them and nothing else reads them; else as they are."""
    if not read_once(q, NORM_ROPE):
        return q
    with building(q) as build:
        made = build(NORM_ROPE, *q.args, to="e4m3")
    replace(q, made)
    return made
