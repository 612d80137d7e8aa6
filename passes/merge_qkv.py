"""Queries, keys and values of self-attention by one linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from lltk.graph.edit import building, calls, prune, replace
from lltk.graph.linears import linear_module
from lltk.graph.packed import FP8_ENDINGS, is_packed
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.passes.lora import is_adapter

aten = torch.ops.aten
PARTS = ("to_q", "to_k", "to_v")
MERGED = "to_qkv"
_ENDINGS = (".weight", ".bias", *FP8_ENDINGS)
"""What can be joined by rows."""


class Config(PassConfig):
    """Nothing to configure."""


@dataclass(frozen=True)
class _JoinedWeights:
    """The state map of joined weights.

    Attributes:
        rows: of the parts, by module path of the attention.
    """

    rows: Mapping[str, tuple[int, ...]]

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join the parts' rows."""
        mapped = dict(state)
        for attention in self.rows:
            names = [f"{attention}.{part}" for part in PARTS]
            held = {n: t for n, t in mapped.items() if n.startswith(tuple(f"{m}." for m in names))}
            if is_packed(held):
                raise ValueError(
                    f"{names[0]} is stored in NVFP4, a scale for the whole weight; weights of "
                    "different scales cannot be joined: leave merge_qkv out of the recipe"
                )
            for ending in _ENDINGS:
                parts = [mapped.pop(name + ending) for name in names if name + ending in mapped]
                if len(parts) not in (0, len(names)):
                    raise ValueError(
                        f"{attention}: {len(parts)} of {', '.join(PARTS)} have a {ending[1:]}; "
                        "all three or none can be joined"
                    )
                if parts:
                    mapped[f"{attention}.{MERGED}{ending}"] = torch.cat(parts)
        return mapped

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Split the rows again."""
        mapped = dict(state)
        for attention, rows in self.rows.items():
            for ending in _ENDINGS:
                joined = mapped.pop(f"{attention}.{MERGED}{ending}", None)
                if joined is not None:
                    names = (f"{attention}.{part}{ending}" for part in PARTS)
                    pieces = (piece.contiguous() for piece in joined.split(rows))
                    mapped |= zip(names, pieces, strict=True)
        return mapped


class MergeQkv(Pass[Config]):
    """Multiply what queries, keys and values are made from by one weight, their rows joined.

    ::

        q, k, v = linear(x, Wq), linear(x, Wk), linear(x, Wv)
            →  y = linear(x, [Wq; Wk; Wv]); q, k, v = slices of y

    ``attn1.to_q.weight``, ``….to_k.weight`` and ``….to_v.weight`` become ``attn1.to_qkv.weight``,
    biases likewise; patterns of later passes name ``to_qkv``. Where only some of the three are
    wanted, as in the commit's last block, the others are computed all the same.
    """

    Config = Config
    reads = (Stage.CAUSAL,)
    kinds = ("stream", "score", "reference")
    numerics = Numerics.ROUNDING

    def requires(self, program: Program) -> None:
        if adapters := [name for name in program.weights if is_adapter(name)]:
            raise ValueError(
                f"{len(adapters)} adapters are not merged, first {adapters[0]}; put merge_lora "
                "before it in the recipe"
            )

    def apply(self, program: Program, report: Report) -> None:
        groups = [group for graph in program.graphs.values() for group in _groups(program, graph)]
        whole = {group.attention: group.rows for group in groups if len(group.linears) == 3}
        for group in groups:
            if group.attention not in whole:
                some = next(iter(group.linears.values()))
                report.miss(some, f"{group.attention}: nothing reads all three of one input")
        program.change_weights(_JoinedWeights(whole))
        for group in groups:
            if group.attention in whole:
                _merge(group, whole[group.attention])
                report.match("self-attention" if len(group.linears) == 3 else "a part of it")
        for graph in program.graphs.values():
            prune(graph)

    def ensures(self, program: Program) -> None:
        graphs = program.graphs.values()
        read = {str(node.target) for graph in graphs for node in graph.find_nodes(op="get_attr")}
        left = program.weights.keys() - read
        assert not left, f"nothing reads {sorted(left)}"


@dataclass(frozen=True)
class _Group:
    """Linears of one attention that read one x, by part."""

    attention: str
    linears: dict[str, fx.Node]

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(int(self.linears[part].meta["val"].shape[-1]) for part in PARTS)


def _groups(program: Program, graph: fx.Graph) -> Iterator[_Group]:
    found: dict[tuple[str, Any], dict[str, fx.Node]] = {}
    for node in calls(graph, aten.linear.default):
        attention, _, part = linear_module(node).rpartition(".")
        layer = program.spec.layer_of(attention, program.spec.self_attention)
        if part in PARTS and layer is not None:
            found.setdefault((attention, node.args[0]), {})[part] = node
    for (attention, _), linears in found.items():
        yield _Group(attention, linears)


def _merge(group: _Group, rows: tuple[int, ...]) -> None:
    first = next(iter(group.linears.values()))
    x, *parameters = first.args
    with building(first, f"{group.attention}.{MERGED}") as build:
        names = (f"{group.attention}.{MERGED}.{kind}" for kind in ("weight", "bias"))
        held = [build.attribute(name) for _, name in zip(parameters, names, strict=False)]
        made = build(aten.linear.default, x, *held)
    ends = dict(zip(PARTS, accumulate(rows), strict=True))
    for part, node in group.linears.items():
        width = int(node.meta["val"].shape[-1])
        with building(node) as build:
            part_of = build(aten.slice.Tensor, made, -1, ends[part] - width, ends[part])
        replace(node, part_of)
