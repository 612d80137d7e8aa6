"""The cache in NVFP4: a page is quantised once, when it is committed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import fx

from lltk.graph.contract import Role
from lltk.graph.edit import add_input, building, calls, drop_unused_inputs, replace, shape
from lltk.graph.linears import Rule
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_paged_attention.reference import empty_pages
from lltk.ops.nvfp4_quantise.reference import BLOCK

NVFP4_PAGED_ATTENTION = overload("nvfp4_paged_attention")
NVFP4_WRITE_PAGE = overload("nvfp4_write_page")
PAGED_ATTENTION = overload("paged_attention")
WRITE_PAGE = overload("write_page")

_ROLES = {
    "codes": Role.PAGE_CODES,
    "scales": Role.PAGE_SCALES,
    "decode_scales": Role.PAGE_DECODE_SCALES,
    "means": Role.PAGE_MEANS,
}
"""The roles of the parts of a page."""


class Config(PassConfig):
    """How pages are quantised."""

    smoothing: bool = Field(
        True, description="whether pages keep each channel's mean apart, for keys and for values"
    )
    rule: Rule = Field("mse", description="Four Over Six rule; none for plain NVFP4")


class Nvfp4Cache(Pass[Config]):
    """Hold the pages of the cache in NVFP4. The chunk in flight is not quantised.

    ::

        write_page(k_pages_i, k, slot)
            →  nvfp4_write_page(k_pages_codes_i, k_pages_scales_i, k_pages_decode_scales_i,
                                k_pages_means_i, k, slot, rule)
        paged_attention(q, k, v, k_pages_i, v_pages_i, table)
            →  nvfp4_paged_attention(q, k, v, k_pages_codes_i, …, v_pages_codes_i, …, table)

    Codes are uint8 [B, P, T, H, D/2], scales float8_e4m3fn [B, P, T, H, D/16], decode scales
    float32 [B, P, H] and means bfloat16 [B, P, H, D]. Without smoothing there are no means, and
    None stands for them.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    leaves = Stage.QUANTISED
    kinds = ("stream",)
    numerics = Numerics.CHANGING

    def requires(self, program: Program) -> None:
        if program.turns_pages:
            raise ValueError(
                "pages are turned before attention reads them; move bounded_positions behind it in "
                "the recipe"
            )

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            parts: dict[fx.Node, list[fx.Node | None]] = {}
            for node in calls(graph, PAGED_ATTENTION):
                *own, k_pages, v_pages, table = node.args
                arenas = [*self._parts(k_pages, parts), *self._parts(v_pages, parts)]
                with building(node) as build:
                    replace(node, build(NVFP4_PAGED_ATTENTION, *own, *arenas, table))
                report.match("self-attention")
            for node in calls(graph, WRITE_PAGE):
                pages, value, slot = node.args
                with building(node) as build:
                    new = build(
                        NVFP4_WRITE_PAGE, *self._parts(pages, parts), value, slot, self.config.rule
                    )
                replace(node, new)
                report.match("pages")
            drop_unused_inputs(graph)

    def _parts(
        self, pages: object, made: dict[fx.Node, list[fx.Node | None]]
    ) -> list[fx.Node | None]:
        """The inputs in the place of an arena: codes, scales, decode scales, and means or None."""
        assert isinstance(pages, fx.Node)
        if pages not in made:
            name, _, layer = str(pages.target).rpartition("_")
            made[pages] = [
                None
                if like is None
                else add_input(pages.graph, f"{name}_{part}_{layer}", like, _ROLES[part])
                for part, like in _arenas(pages, self.config.smoothing).items()
            ]
        return made[pages]

    def ensures(self, program: Program) -> None:
        for name, graph in program.graphs.items():
            left = [*calls(graph, PAGED_ATTENTION), *calls(graph, WRITE_PAGE)]
            assert not left, f"{name}: {left} still work on pages that are not quantised"


def _arenas(pages: fx.Node, smooth: bool) -> Mapping[str, torch.Tensor | None]:
    sizes = shape(pages)
    if sizes[-1] % BLOCK:
        layer = str(pages.target).rpartition("_")[2]
        raise ValueError(
            f"self-attention of block {layer}: heads of {sizes[-1]} are not a multiple of {BLOCK}, "
            "a block of NVFP4; remove it from the recipe's passes"
        )
    return empty_pages(sizes, smooth, "meta")._asdict()
