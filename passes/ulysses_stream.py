"""A stream on several ranks, which share a chunk's frames, and in self-attention its heads."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import fx

from lltk.graph.contract import Role
from lltk.graph.edit import (
    Builder,
    building,
    calls,
    inputs_of,
    module_of,
    output,
    role_of,
    shape,
)
from lltk.graph.facts import Ranks
from lltk.graph.match import ancestors
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.parallel.exchange import (
    ALL_PARTS,
    HEADS_TO_TOKENS,
    OWN_PART,
    RECEIVE_HEADS,
    SEND_TOKENS,
    TOKENS_TO_HEADS,
)
from lltk.parallel.groups import SEQUENCE

FP8_DEQUANTISE = overload("fp8_dequantise")
FP8_QUANTISE_ATTENTION = overload("fp8_quantise_attention")
NVFP4_DEQUANTISE = overload("nvfp4_dequantise")
NVFP4_PAGED_ATTENTION = overload("nvfp4_paged_attention")
NVFP4_QUANTISE = overload("nvfp4_quantise")
NVFP4_WRITE_PAGE = overload("nvfp4_write_page")
PAGED_ATTENTION = overload("paged_attention")
ROW_PIPELINE = overload("row_pipeline")
WRITE_PAGE = overload("write_page")
aten = torch.ops.aten

_PARTS = {"compute": 1, "fp8": 2, "nvfp4": 3}
"""How many tensors a value is, in each form that it may travel in."""
_WRITTEN = {WRITE_PAGE: 1, NVFP4_WRITE_PAGE: 4}
"""Ops that write a page, and which argument they write."""
_FRAMES = {Role.LATENTS: 2, Role.TIME: 1, Role.POSITIONS: 0}
"""The axis of an input that is the frames."""
_HEADS = {
    Role.PAGES: 3,
    Role.PAGE_CODES: 3,
    Role.PAGE_SCALES: 3,
    Role.PAGE_DECODE_SCALES: 2,
    Role.PAGE_MEANS: 2,
}
"""The axis of a part of the cache that is the heads."""


class Config(PassConfig):
    """How many ranks, and what they exchange."""

    size: int = Field(
        2, ge=2, description="number of ranks, which divides the heads and a chunk's latent frames"
    )
    exchange: Literal["nvfp4", "fp8", "compute"] = Field(
        "fp8",
        description="how a chunk's keys and values are sent: in NVFP4 with a decode scale for each "
        "rank's tokens, in E4M3 with a scale for each head of a token, or in the compute dtype",
    )
    exchange_queries: Literal["fp8", "compute"] = Field(
        "compute",
        description="how its queries are sent, and the results of attention: as exchange says",
    )


class UlyssesStream(Pass[Config]):
    """Give each rank a part of the chunk's frames, and in self-attention a part of the heads.

    ::

        latents, times, positions  →  own_part(latents, 2), …: F/n frames of F
        paged_attention(q, k, v, k_pages_i, v_pages_i, table)
            →  sent = send_tokens([k, v]), then what makes q
               q' = tokens_to_heads([q]): [B, L/n, H, D] → [B, L, H/n, D]
               k', v' = receive_heads(sent, [k, v])
               heads_to_tokens([paged_attention(q', k', v', k_pages_i, v_pages_i, table)])
        write_page(k_pages_i, k, slot)      →  write_page(k_pages_i, k', slot)
        k_pages_i: [B, P, T, H, D]          →  [B, P, T, H/n, D]
        sample                              →  made of all_parts(tokens, 1)

    What does not travel in the compute dtype is quantised before it is sent, and decoded where it
    arrives. Graphs take and give whole chunks, the same on every rank. A linear in NVFP4 has a
    scale for a whole tensor, which is here the tensor of this rank's tokens.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    leaves = Stage.PARTITIONED
    kinds = ("stream",)
    numerics = Numerics.CHANGING

    def requires(self, program: Program) -> None:
        heads, chunk, size = program.spec.heads, program.geometry.chunk, self.config.size
        if heads % size or chunk % size:
            common = math.gcd(heads, chunk)
            fit = [str(n) for n in range(2, common + 1) if common % n == 0]
            raise ValueError(
                f"size: {size} ranks cannot share {heads} heads and chunks of {chunk} latent "
                f"frames evenly; set a size that can ({', '.join(fit) or 'there is none'}), or "
                "geometry.chunk"
            )
        if self.config.exchange == "nvfp4" and (width := program.spec.head_dim) % BLOCK:
            raise ValueError(
                f"exchange: nvfp4 is for heads of whole blocks of {BLOCK}, and the model's are "
                f"{width} wide; set fp8 or compute"
            )
        if any(calls(graph, FP8_QUANTISE_ATTENTION) for graph in program.graphs.values()):
            raise ValueError(
                "attention is quantised before its heads are whole tokens again; remove "
                "fuse_attention_quantise from the recipe's passes"
            )

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            if not inputs_of(graph, Role.LATENTS):
                continue
            self._share_heads(graph, report)
            self._share_frames(program, graph, report)
        program.leave(Ranks(self.config.size))

    def _share_heads(self, graph: fx.Graph, report: Report) -> None:
        for page in graph.find_nodes(op="placeholder"):
            role = role_of(page)
            if role in _HEADS:
                _divide(page, _HEADS[role], self.config.size)
        exchange, queries = self.config.exchange, self.config.exchange_queries
        arrived: dict[Any, fx.Node] = {}
        for target in (PAGED_ATTENTION, NVFP4_PAGED_ATTENTION):
            for node in calls(graph, target):
                own: list[Any] = list(node.args[:3])
                q, k, v = own
                with building(max(k, v).next, module_of(node)) as build:
                    values = self._packed(build, exchange, k, v)
                    sent = self._build(build, SEND_TOKENS, values)
                _delay(q, sent)
                with building(node) as build:
                    heads = self._sent(build, queries, TOKENS_TO_HEADS, q)
                    parts = self._parts(build, RECEIVE_HEADS, sent, values)
                    made = self._unpacked(build, exchange, parts, k, v)
                    arrived |= zip((k, v), made, strict=True)
                node.args = (heads, arrived[k], arrived[v], *node.args[3:])
                readers = list(node.users)
                with building(node.next, module_of(node)) as build:
                    tokens = self._sent(build, queries, HEADS_TO_TOKENS, node)
                for reader in readers:
                    reader.replace_input_with(node, tokens)
                report.match("self-attention")
        for target, position in _WRITTEN.items():
            for node in calls(graph, target):
                value = node.args[position]
                if value not in arrived:  # of a block that does not attend, or a key before RoPE
                    with building(node) as build:
                        arrived[value] = self._sent(build, exchange, TOKENS_TO_HEADS, value)
                node.update_arg(position, arrived[value])
                report.match("pages")

    def _build(self, build: Builder, op: Any, *args: Any) -> fx.Node:
        return build(op, *args, self.config.size, SEQUENCE)

    def _parts(self, build: Builder, op: Any, *args: Any) -> list[fx.Node]:
        """The results of an op, one for each of the values that are its last argument."""
        made = self._build(build, op, *args)
        return [build(operator.getitem, made, index) for index in range(len(args[-1]))]

    def _sent(self, build: Builder, form: str, op: Any, value: Any) -> fx.Node:
        """What an exchange makes of a value that travels in some form."""
        parts = self._parts(build, op, self._packed(build, form, value))
        (arrived,) = self._unpacked(build, form, parts, value)
        return arrived

    def _packed(self, build: Builder, form: str, *values: Any) -> list[fx.Node]:
        """Values as they are sent, a few parts each."""
        packed: list[fx.Node] = []
        for value in values:
            if form == "compute":
                packed.append(value)
                continue
            made = (
                build(ROW_PIPELINE, value, to="fp8")
                if form == "fp8"
                else build(NVFP4_QUANTISE, value)
            )
            parts = [build(operator.getitem, made, index) for index in range(_PARTS[form])]
            if form == "nvfp4":  # one scale for all tokens, which goes to whoever gets a head
                batch, _, heads, _ = shape(value)
                parts[2] = build(aten.expand.default, parts[2], [batch, 1, heads])
            packed += parts
        return packed

    def _unpacked(
        self, build: Builder, form: str, parts: list[fx.Node], *values: Any
    ) -> list[fx.Node]:
        """The values again, from what was sent."""
        if form == "compute":
            return parts
        made = []
        for index, value in enumerate(values):
            count, dtype = _PARTS[form], value.meta["val"].dtype
            own = parts[index * count : (index + 1) * count]
            if form == "fp8":
                made.append(build(FP8_DEQUANTISE, *own, dtype))
                continue
            codes, scales = (
                build(aten.unflatten.int, part, 1, [self.config.size, -1]) for part in own[:2]
            )
            of_rank = build(aten.select.int, own[2], 2, 0)  # [B, n]: all heads' are the same
            ranks = build(NVFP4_DEQUANTISE, codes, scales, of_rank, dtype)
            made.append(build(aten.flatten.using_ints, ranks, 1, 2))
        return made

    def _share_frames(self, program: Program, graph: fx.Graph, report: Report) -> None:
        spec, size = program.spec, self.config.size
        first = next(node for node in graph.nodes if node.op != "placeholder")
        for node in list(graph.nodes):
            role = role_of(node)
            if role not in _FRAMES:
                continue
            if node.op == "placeholder":
                self._insert(OWN_PART, node, first, "", _FRAMES[role])
                report.match("inputs")
            else:  # the zeros that stand in for the commit's timesteps
                batch, frames = shape(node)
                node.update_arg(1, [batch, frames // size])
        tokens = program.geometry.chunk * program.geometry.frame_tokens(spec)
        for value in output(graph).all_input_nodes:
            last: Any = value
            while len(shape(last)) != 3 or shape(last)[1] != tokens:
                (last,) = last.all_input_nodes
            self._insert(ALL_PARTS, last, last.next, "", 1)
            report.match("outputs")

    def _insert(self, op: Any, value: fx.Node, before: fx.Node, module: str, *dim: int) -> None:
        """Insert an op of a value, which all readers of the value read instead."""
        with building(before, module) as build:
            new = self._build(build, op, value, *dim)
        value.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def ensures(self, program: Program) -> None:
        result = program.spec.output
        for name in program.graphs:
            contract = program.contract(name)
            if result in contract.outputs:
                size = math.prod(contract.outputs[result].shape)
                whole = math.prod(contract.input(Role.LATENTS).shape)
                assert size == whole, f"{name}: {result} has {size} elements, not {whole}"


def _delay(value: fx.Node, until: fx.Node) -> None:
    """Move the nodes that make a value behind ``until``, but for those that ``until`` needs."""
    needed, makers = ancestors(until), ancestors(value) | {value}
    for node in sorted(makers - needed, reverse=True):
        if node < until and node.op == "call_function":
            until.append(node)


def _divide(page: fx.Node, dim: int, size: int) -> None:
    """Let a part of the cache hold this rank's heads only."""
    sizes = list(shape(page))
    sizes[dim] //= size
    page.meta["val"] = page.meta["val"].new_empty(sizes)
