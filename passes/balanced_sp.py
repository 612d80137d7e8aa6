"""Whole clips on several ranks: they share a clip's frames, and in self-attention the heads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import gcd
from typing import Any, Literal

import torch
from pydantic import Field
from torch import fx

from lltk.graph.contract import Role
from lltk.graph.edit import Builder, building, calls, input_of, module_of, role_of, shape
from lltk.graph.facts import Ranks
from lltk.graph.match import ancestors
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.nvfp4_quantise_transposed.reference import padded
from lltk.parallel.exchange import ALL_MAX, HEADS_TO_TOKENS, OWN_SEED, TOKENS_TO_HEADS
from lltk.parallel.groups import SEQUENCE

aten = torch.ops.aten
BLOCK_CAUSAL_ATTENTION = overload("block_causal_attention")
NVFP4_LARGEST = overload("nvfp4_largest")
NVFP4_LINEAR = overload("nvfp4_linear")
NVFP4_QUANTISE = overload("nvfp4_quantise")
NVFP4_QUANTISE_TRANSPOSED = overload("nvfp4_quantise_transposed")
ROUNDED_EXCHANGE = overload("rounded_exchange")

FRAMES = {Role.LATENTS: 2, Role.CLEAN: 2, Role.TIME: 1, Role.POSITIONS: 0, Role.TEXT: 1}
"""The axis of an input that is the clip's frames, or its chunks."""


class Config(PassConfig):
    """How many ranks, and how they exchange."""

    size: int = Field(
        2,
        ge=1,
        description="number of ranks that share a clip, which divides the heads and the chunks; "
        "with 1 the graph stays as it is",
    )
    exchange: Literal["nvfp4", "fp8", "compute"] = Field(
        "compute",
        description="how queries, keys, values, the results of attention, and the gradients of all "
        "are sent: in NVFP4, in E4M3 with a scale for each head of a token, or in compute dtype",
    )


class BalancedSP(Pass[Config]):
    """Give each rank some frames of a clip; under teacher forcing the same ones clean and noisy.

    ::

        noisy: [B, C, F, h, w], …  →  [B, C, F/n, h, w]: consecutive chunks of the clip
        block_causal_attention(q, k, v, chunk tokens, clean)
            →  q', k', v' = tokens_to_heads([q, k, v]): [B, L/n, H, D] → [B, L, H/n, D]
               heads_to_tokens([block_causal_attention(q', k', v', chunk tokens, clean, n)])
        sample: [B, C, F, h, w]    →  [B, C, F/n, h, w]

    Every rank predicts for as many noisy tokens as the others. After an exchange the sequence is
    [clean; noisy] of each rank in turn, or in a score program the clip's. The mask reads this
    order, so nothing is permuted. Positions are those of the rank's frames in the clip. The
    gradient of an exchange is its inverse. The layout is LongLive-2.0's Balanced SP over
    DeepSpeed-Ulysses. With another exchange than ``compute`` each is a `rounded_exchange`, which
    rounds what it sends, both ways. The pass needs a prompt a chunk.

    Linears that train in NVFP4 round as on one rank::

        nvfp4_quantise(x, 1, rule)
            →  largest = all_max(nvfp4_largest(x, signs))
               nvfp4_quantise(x, 1, rule, None, 0, largest[0])
        nvfp4_quantise_transposed(x, signs, rule)
            →  nvfp4_quantise_transposed(x, signs, rule, None, 0, largest[1])
        nvfp4_linear(…, seed, …)
            →  nvfp4_linear(…, own_seed(seed), …, run, n, 'sequence')

    x's rows are this rank's in runs: of each clip the clean ones and the noisy ones, or those of
    its prompts. A run is whole blocks and transforms of the rows that one rank would have, so that
    dW's operands are the same too. `nvfp4_linear` does with a gradient what is done with x. Linears
    of `nvfp4_infer` have a scale for a whole tensor, which is here that of this rank's tokens.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    leaves = Stage.PARTITIONED
    kinds = ("train", "score")
    numerics = Numerics.CHANGING

    def requires(self, program: Program) -> None:
        heads, geometry, size = program.spec.heads, program.geometry, self.config.size
        graph = program.graphs[program.kind]
        if size > 1 and len(shape(input_of(graph, Role.TEXT))) != 4:
            raise ValueError(
                "needs a prompt a chunk, or ranks would divide the tokens of one; put "
                "text_per_chunk before teacher_forcing or block_causal in the recipe's passes"
            )
        if heads % size:
            fit = [str(n) for n in range(2, heads + 1) if heads % n == 0]
            raise ValueError(
                f"size: {size} ranks cannot share {heads} heads evenly; set a size that can "
                f"({', '.join(['1', *fit])})"
            )
        if geometry.chunks % size:
            raise ValueError(
                f"size: {size} ranks cannot share {geometry.frames} latent frames in chunks of "
                f"{geometry.chunk} evenly; set geometry.frames to "
                f"{_nearest(geometry.frames, size * geometry.chunk)}"
            )
        if self.config.exchange == "nvfp4" and (width := program.spec.head_dim) % BLOCK:
            raise ValueError(
                f"exchange: nvfp4 is for heads of whole blocks of {BLOCK}, and the model's are "
                f"{width} wide; set fp8 or compute"
            )
        for node in calls(graph, NVFP4_LINEAR) if size > 1 else []:
            run, unit = self._run(program, node), padded(1, _signs(node))
            if run % unit:
                step = size * geometry.chunk * (unit // gcd(unit, _rows_of_chunk(program, node)))
                raise ValueError(
                    f"size: {module_of(node)} would have runs of {run} rows on each of {size} "
                    f"ranks, which are not whole blocks of {unit} in NVFP4; set geometry.frames to "
                    f"{_nearest(geometry.frames, step)}, or exclude it with nvfp4_train.exclude"
                )

    def apply(self, program: Program, report: Report) -> None:
        graph = program.graphs[program.kind]
        if self.config.size == 1:
            report.match("one rank")
            return
        for node in calls(graph, NVFP4_LINEAR):
            self._share_rows(program, node)
            report.match("linears in NVFP4")
        for node in calls(graph, NVFP4_QUANTISE_TRANSPOSED):
            self._share_scales(node)
        for node in graph.find_nodes(op="placeholder"):
            if (role := role_of(node)) in FRAMES:
                _divide(node, FRAMES[role], self.config.size)
                report.match("inputs")
        for node in calls(graph, BLOCK_CAUSAL_ATTENTION):
            exchange_heads(node, self._exchanged, self.config.size)
            report.match("self-attention")
        for node in calls(graph, aten.reshape.default):
            batch, *sizes = shape(node)
            if program.kind == "score" and sizes[0] == program.geometry.frames:
                node.update_arg(1, [batch, sizes[0] // self.config.size, *sizes[1:]])
        program.leave(Ranks(self.config.size))

    def _exchanged(self, build: Builder, op: Any, values: list[Any]) -> fx.Node:
        form, size = self.config.exchange, self.config.size
        if form == "compute":
            return build(op, values, size, SEQUENCE)
        return build(ROUNDED_EXCHANGE, values, op is TOKENS_TO_HEADS, form, size, SEQUENCE)

    def _run(self, program: Program, linear: fx.Node) -> int:
        """How many of a linear's rows follow one another both on a rank and on one alone."""
        return _rows_of_chunk(program, linear) * program.geometry.chunks // self.config.size

    def _share_rows(self, program: Program, node: fx.Node) -> None:
        """Let a linear round gradients as one rank does."""
        seed: Any = node.args[_SEED]
        if node.args[_STOCHASTIC]:
            own = next((user for user in seed.users if user.target is OWN_SEED), None)
            if own is None:
                with building(seed.next, "") as build:
                    name = f"own_{seed.name}"
                    own = build(OWN_SEED, seed, self.config.size, SEQUENCE, name=name)
            node.update_arg(_SEED, own)
        node.args = (*node.args, self._run(program, node), self.config.size, SEQUENCE)

    def _share_scales(self, turned: fx.Node) -> None:
        """Let what quantises x, and its transpose, scale it by the largest of all ranks."""
        x, signs, _ = turned.args
        assert isinstance(x, fx.Node)
        (rows,) = (user for user in x.users if user.target is NVFP4_QUANTISE)
        with building(min(rows, turned)) as build:
            found = build(NVFP4_LARGEST, x, signs)
            largest = build(ALL_MAX, found, self.config.size, SEQUENCE)
            for index, node in enumerate((rows, turned)):
                node.args = (*node.args, None, 0, build(aten.select.int, largest, 0, index))


def exchange_heads(
    node: fx.Node, exchanged: Callable[[Builder, Any, list[Any]], fx.Node], *layout: int
) -> None:
    """Let ranks exchange tokens for heads before an attention, and heads for tokens after it.

    Args:
        node: the attention.
        exchanged: adds an exchange of values, of which it is given the op.
        layout: arguments that the attention gets, too.
    """
    q, k, v, *rest = node.args
    readers = list(node.users)
    with building(node) as build:
        heads = exchanged(build, TOKENS_TO_HEADS, [q, k, v])
        operands = [build(operator.getitem, heads, index) for index in range(3)]
        out = build(BLOCK_CAUSAL_ATTENTION, *operands, *rest, *layout)
        tokens = exchanged(build, HEADS_TO_TOKENS, [out])
        own = build(operator.getitem, tokens, 0)
    for reader in readers:
        reader.replace_input_with(node, own)


_SEED, _STOCHASTIC, _SIGNS = 13, 15, 17
"""Which of `nvfp4_linear`'s arguments they are."""


def _signs(linear: fx.Node) -> list[int]:
    signs: Any = linear.args[_SIGNS]
    return list(signs)


def _rows_of_chunk(program: Program, linear: fx.Node) -> int:
    """How many rows of a chunk a linear reads: tokens of a copy, a prompt's tokens, or frames."""
    x, geometry = linear.args[0], program.geometry
    assert isinstance(x, fx.Node)
    roles = {role_of(source) for source in ancestors(x)}
    if Role.LATENTS in roles:
        return geometry.chunk * geometry.frame_tokens(program.spec)
    return geometry.text_tokens if Role.TEXT in roles else geometry.chunk


def _nearest(frames: int, step: int) -> str:
    """The multiples of a step that are next to a number of frames."""
    below = frames // step * step
    return " or ".join(str(near) for near in (below, below + step) if near)


def _divide(node: fx.Node, axis: int, size: int) -> None:
    """Let an input hold this rank's part along an axis."""
    value = node.meta["val"]
    node.meta["val"] = value.narrow(axis, 0, shape(node)[axis] // size).contiguous()
