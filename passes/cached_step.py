"""The stream's step: a chunk attends to itself and to committed pages."""

from __future__ import annotations

import torch

from lltk.graph.attention import find_attention
from lltk.graph.contract import Role
from lltk.graph.edit import add_input, building, replace, shape
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

PAGED_ATTENTION = overload("paged_attention")


class Config(PassConfig):
    """Nothing to configure."""


class CachedStep(Pass[Config]):
    """Replace the step's self-attention by attention over pages.

    ::

        attend(q, k, v)  →  lltk.paged_attention(q, k, v, k_pages_i, v_pages_i, table)

    ``k_pages_i`` and ``v_pages_i`` are the pages of layer i, [B, P, T, H, D] in the compute dtype.
    ``table`` lists the committed pages to attend to, int64 [N].
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    kinds = ("stream",)
    numerics = Numerics.CHANGING

    def requires(self, program: Program) -> None:
        if "step" not in program.graphs:
            raise ValueError("there is no step graph; put hoist_text before it in the recipe")

    def apply(self, program: Program, report: Report) -> None:
        step, pages = program.graphs["step"], program.geometry.pages
        found = list(find_attention(program, step, program.spec.self_attention, report))
        if not found:
            return
        table = add_input(
            step, "table", torch.empty(pages - 1, dtype=torch.int64, device="meta"), Role.TABLE
        )
        for attention in found:
            batch, *page = shape(attention.k)
            like = attention.k.meta["val"].new_empty((batch, pages, *page))
            arenas = [
                add_input(step, f"{name}_pages_{attention.layer}", like, Role.PAGES)
                for name in ("k", "v")
            ]
            with building(attention.node) as build:
                operands = (attention.q, attention.k, attention.v)
                out = build(PAGED_ATTENTION, *operands, *arenas, table)
            replace(attention.result, out)
            report.match("self-attention")
