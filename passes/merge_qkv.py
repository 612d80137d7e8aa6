"""One linear for the queries, keys and values of self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from lltk.graph.edit import building, calls, prune, replace, shape
from lltk.graph.linears import linear_module
from lltk.graph.packed import FP8_ENDINGS, is_packed
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.spec import LinearRole
from lltk.graph.stages import Stage
from lltk.passes.lora import is_adapter

aten = torch.ops.aten
_PARTS = (LinearRole.SELF_QUERY, LinearRole.SELF_KEY, LinearRole.SELF_VALUE)
_ENDINGS = (".weight", ".bias", *FP8_ENDINGS)
"""What can be joined by rows."""


class Config(PassConfig):
    """Nothing to configure."""


@dataclass(frozen=True)
class _JoinedWeights:
    """The state map of joined weights.

    Attributes:
        rows: for each module that joins others: how many rows each of these has, in order.
    """

    rows: Mapping[str, Mapping[str, int]]

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join the parts' rows."""
        mapped = dict(state)
        for joint, parts in self.rows.items():
            for part in parts:
                if is_packed(name for name in mapped if name.startswith(f"{part}.")):
                    raise ValueError(
                        f"{part} is stored in NVFP4, with one scale for the whole weight; weights "
                        "of different scales cannot be joined: leave merge_qkv out of the recipe"
                    )
            for ending in _ENDINGS:
                held = [mapped.pop(part + ending) for part in parts if part + ending in mapped]
                if len(held) not in (0, len(parts)):
                    raise ValueError(
                        f"{joint}: {len(held)} of {', '.join(parts)} have a {ending[1:]}; all "
                        "three or none can be joined"
                    )
                if held:
                    mapped[joint + ending] = torch.cat(held)
        return mapped

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Split the rows again."""
        mapped = dict(state)
        for joint, parts in self.rows.items():
            for ending in _ENDINGS:
                rows = mapped.pop(joint + ending, None)
                if rows is not None:
                    pieces = (piece.contiguous() for piece in rows.split(list(parts.values())))
                    mapped |= zip((part + ending for part in parts), pieces, strict=True)
        return mapped


class MergeQkv(Pass[Config]):
    """Make queries, keys and values by one product, with the rows of their weights joined.

    ::

        q, k, v = linear(x, Wq), linear(x, Wk), linear(x, Wv)
            →  y = linear(x, [Wq; Wk; Wv]); q, k, v = slices of y

    The three weights become one, under the path that the model's spec has for
    `LinearRole.SELF_QKV`, and so do the biases; patterns of later passes name that path. Where only
    some of the three are wanted, as in the commit's last block, the others are computed all the
    same.
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
        rows = {group.joint: group.rows for group in groups if len(group.linears) == len(_PARTS)}
        program.change_weights(_JoinedWeights(rows))
        for group in groups:
            nodes = list(group.linears.values())
            if group.joint in rows:
                _join(group.joint, nodes, rows[group.joint])
                report.match("self-attention" if len(nodes) == len(_PARTS) else "a part of it")
            else:
                report.miss(nodes[0], f"{group.joint}: nothing reads all three of one input")
        for graph in program.graphs.values():
            prune(graph)

    def ensures(self, program: Program) -> None:
        graphs = program.graphs.values()
        read = {str(node.target) for graph in graphs for node in graph.find_nodes(op="get_attr")}
        left = program.weights.keys() - read
        assert not left, f"nothing reads {sorted(left)}"


@dataclass(frozen=True)
class _Group:
    """Linears of one self-attention that read one x.

    Attributes:
        joint: the module that joins them.
        linears: by role.
    """

    joint: str
    linears: dict[LinearRole, fx.Node]

    @property
    def rows(self) -> dict[str, int]:
        """How many rows each linear has, by its module, in order. The group must be whole."""
        nodes = [self.linears[role] for role in _PARTS]
        return {linear_module(node): shape(node)[-1] for node in nodes}


def _groups(program: Program, graph: fx.Graph) -> list[_Group]:
    joint = program.spec.linears[LinearRole.SELF_QKV]
    found: dict[Any, _Group] = {}
    for node in calls(graph, aten.linear.default):
        module = linear_module(node)
        role, layer = program.spec.linear_role(module), program.spec.layer_of(module)
        if role in _PARTS:
            group = _Group(joint.format(layer=layer), {})
            found.setdefault((layer, node.args[0]), group).linears[role] = node
    return list(found.values())


def _join(joint: str, nodes: list[fx.Node], rows: Mapping[str, int]) -> None:
    x, *parameters = nodes[0].args
    with building(nodes[0], joint) as build:
        names = (f"{joint}.{kind}" for kind in ("weight", "bias"))
        held = [build.attribute(name) for _, name in zip(parameters, names, strict=False)]
        made = build(aten.linear.default, x, *held)
    ends = dict(zip(rows, accumulate(rows.values()), strict=True))
    for node in nodes:
        part = linear_module(node)
        with building(node) as build:
            own = build(aten.slice.Tensor, made, -1, ends[part] - rows[part], ends[part])
        replace(node, own)
