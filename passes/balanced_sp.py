"""Teacher forcing on several ranks: they share a clip's frames, and in self-attention the heads."""

from __future__ import annotations

import operator

from pydantic import Field
from torch import fx

from lltk.graph.contract import Role
from lltk.graph.edit import building, calls, role_of, shape
from lltk.graph.facts import Ranks
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload
from lltk.parallel.exchange import HEADS_TO_TOKENS, TOKENS_TO_HEADS
from lltk.parallel.groups import SEQUENCE

BLOCK_CAUSAL_ATTENTION = overload("block_causal_attention")

FRAMES = {Role.LATENTS: 2, Role.CLEAN: 2, Role.TIME: 1, Role.POSITIONS: 0, Role.TEXT: 1}
"""The axis of an input that is the clip's frames, or its chunks."""


class Config(PassConfig):
    """How many ranks."""

    size: int = Field(
        2,
        ge=1,
        description="number of ranks that share a clip, which divides the heads and the chunks; "
        "with 1 the graph stays as it is",
    )


class BalancedSP(Pass[Config]):
    """Give each rank the clean and the noisy latents of the same frames.

    ::

        noisy: [B, C, F, h, w], …  →  [B, C, F/n, h, w]: consecutive chunks of the clip
        block_causal_attention(q, k, v, chunk tokens, True)
            →  q', k', v' = tokens_to_heads([q, k, v]): [B, L/n, H, D] → [B, L, H/n, D]
               heads_to_tokens([block_causal_attention(q', k', v', chunk tokens, True, n)])
        sample: [B, C, F, h, w]    →  [B, C, F/n, h, w]

    Every rank predicts for as many noisy tokens as the others. After an exchange the sequence is
    [clean; noisy] of each rank in turn. The mask reads this order, so nothing is permuted.
    Positions are those of the rank's frames in the clip. The gradient of an exchange is its
    inverse. The layout is LongLive-2.0's Balanced SP over DeepSpeed-Ulysses.
    """

    Config = Config
    reads = (Stage.CAUSAL,)
    leaves = Stage.PARTITIONED
    kinds = ("train",)
    numerics = Numerics.CHANGING

    def requires(self, program: Program) -> None:
        heads, geometry, size = program.spec.heads, program.geometry, self.config.size
        if heads % size:
            fit = [str(n) for n in range(2, heads + 1) if heads % n == 0]
            raise ValueError(
                f"size: {size} ranks cannot share {heads} heads evenly; set a size that can "
                f"({', '.join(['1', *fit])})"
            )
        if geometry.chunks % size:
            step = size * geometry.chunk
            below = geometry.frames // step * step
            near = " or ".join(str(frames) for frames in (below, below + step) if frames)
            raise ValueError(
                f"size: {size} ranks cannot share {geometry.frames} latent frames in chunks of "
                f"{geometry.chunk} evenly; set geometry.frames to {near}"
            )

    def apply(self, program: Program, report: Report) -> None:
        (graph,) = program.graphs.values()
        if self.config.size == 1:
            report.match("one rank")
            return
        for node in graph.find_nodes(op="placeholder"):
            if (role := role_of(node)) in FRAMES:
                _divide(node, FRAMES[role], self.config.size)
                report.match("inputs")
        for node in calls(graph, BLOCK_CAUSAL_ATTENTION):
            self._share_heads(node)
            report.match("self-attention")
        program.leave(Ranks(self.config.size))

    def _share_heads(self, node: fx.Node) -> None:
        q, k, v, *rest = node.args
        readers, size = list(node.users), self.config.size
        with building(node) as build:
            heads = build(TOKENS_TO_HEADS, [q, k, v], size, SEQUENCE)
            operands = [build(operator.getitem, heads, index) for index in range(3)]
            out = build(BLOCK_CAUSAL_ATTENTION, *operands, *rest, size)
            tokens = build(HEADS_TO_TOKENS, [out], size, SEQUENCE)
            own = build(operator.getitem, tokens, 0)
        for reader in readers:
            reader.replace_input_with(node, own)


def _divide(node: fx.Node, axis: int, size: int) -> None:
    """Let an input hold this rank's part along an axis."""
    value = node.meta["val"]
    node.meta["val"] = value.narrow(axis, 0, shape(node)[axis] // size).contiguous()
