"""Teacher forcing on several ranks that divide [clean; noisy] as it stands, to compare with."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import fx

from lltk.graph.attention import find_attention
from lltk.graph.contract import Role
from lltk.graph.edit import calls, input_of, inputs_of, op_of, role_of, shape
from lltk.graph.facts import Ranks
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload
from lltk.parallel.groups import SEQUENCE
from lltk.passes.balanced_sp import exchange_heads
from lltk.passes.block_causal import rewrite_self_attention

aten = torch.ops.aten
BLOCK_CAUSAL_ATTENTION = overload("block_causal_attention")

FRAMES = {Role.LATENTS: 2, Role.TIME: 1, Role.POSITIONS: 0}
"""The axis of an input that is the frames of the clean and the noisy clip."""


class Config(PassConfig):
    """How many ranks."""

    size: int = Field(
        2,
        ge=2,
        multiple_of=2,
        description="number of ranks that share a clip, which divides the heads; half of them have "
        "the clean chunks, half the noisy ones, and each equally many",
    )


class NaiveSP(Pass[Config]):
    """Divide the sequence [clean; noisy] among ranks in its order, without a thought of the loss.

    It stands in the place of `teacher_forcing` and `balanced_sp`, and is there to be measured
    beside them: half of the ranks have clean frames alone, which bear no loss. ::

        latents: [B, C, 2F, h, w], …  →  [B, C, 2F/n, h, w]: the rank's part of [clean; noisy]
        text: [B, N, S, E]            →  [B, 2N/n, S, E]: the prompts of its chunks
        attend(q, k, v)               →  as `balanced_sp` has it, with the mask of [clean; noisy]
        sample: [B, C, 2F, h, w]      →  [B, C, 2F/n, h, w]

    The pass needs timesteps and positions per frame, and a prompt a chunk.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    leaves = Stage.PARTITIONED
    kinds = ("train",)
    numerics = Numerics.CHANGING

    def requires(self, program: Program) -> None:
        (graph,) = program.graphs.values()
        size, heads, chunks = self.config.size, program.spec.heads, program.geometry.chunks
        if (
            len(shape(input_of(graph, Role.TIME))) != 2
            or len(shape(input_of(graph, Role.TEXT))) != 4
            or not inputs_of(graph, Role.POSITIONS)
        ):
            raise ValueError(
                "needs timesteps and positions per frame, and a prompt a chunk; put "
                "per_frame_timesteps, frame_positions and text_per_chunk before it in the recipe's "
                "passes"
            )
        if heads % size or 2 * chunks % size:
            raise ValueError(
                f"size: {size} ranks cannot share {heads} heads and {2 * chunks} clean and noisy "
                "chunks evenly; set a size that divides both"
            )

    def apply(self, program: Program, report: Report) -> None:
        (graph,) = program.graphs.values()
        size, frames = self.config.size, 2 * program.geometry.frames
        rewrite_self_attention(program, "train", True, report)
        for node in calls(graph, BLOCK_CAUSAL_ATTENTION):
            exchange_heads(node, lambda build, op, values: build(op, values, size, SEQUENCE))
        for attention in find_attention(program, graph, program.spec.cross_attention, report):
            for repeated in (attention.k, attention.v):
                repeated.replace_all_uses_with(_once(repeated))
        for node in calls(graph, aten.reshape.default):
            if shape(node)[1:2] == (frames,):
                batch, _, *rest = shape(node)
                node.update_arg(1, [batch, -1, *rest])
        for node in graph.find_nodes(op="placeholder"):
            role, value = role_of(node), node.meta["val"]
            if role in FRAMES:
                axis = FRAMES[role]
                node.meta["val"] = value.narrow(axis, 0, frames // size).contiguous()
            elif role is Role.TEXT:
                batch, chunks, *rest = value.shape
                node.meta["val"] = value.new_empty((batch, 2 * chunks // size, *rest))
            else:
                continue
            report.match("inputs")
        program.leave(Ranks(size))


def _once(repeated: fx.Node) -> fx.Node:
    """Keys or values before `text_per_chunk` repeated them for clean and noisy chunks."""
    value = repeated
    for op in (aten.flatten.using_ints, aten.expand.default, aten.unflatten.int):
        assert op_of(value) is op, f"{value} is no repeated text"
        value = value.all_input_nodes[0]
    return value
