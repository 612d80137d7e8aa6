"""A prompt for each chunk: a chunk's tokens attend to their own prompt only."""

from __future__ import annotations

import torch
from torch import fx

from lltk.graph.attention import attend, find_attention
from lltk.graph.contract import Role
from lltk.graph.edit import Builder, building, input_of, replace, shape
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure."""


class TextPerChunk(Pass[Config]):
    """Give every chunk a prompt of its own in cross-attention.

    ::

        text: [B, S, E]  →  [B, N, S, E], one prompt for each of N chunks
        attend(q[B, L, …], k[B, S, …])    →  attend(q[B·N, L/N, …], k[B·N, S, …]), chunks as batch

    In a train graph, which holds a clip's clean and noisy chunks, both copies of a chunk read the
    same prompt.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    kinds = ("train", "score", "reference")
    numerics = Numerics.CHANGING

    def apply(self, program: Program, report: Report) -> None:
        spec, prompts = program.spec, program.geometry.chunks
        for graph in program.graphs.values():
            text = input_of(graph, Role.TEXT)
            batch, tokens, width = shape(text)
            frames = shape(input_of(graph, Role.LATENTS))[2]
            chunk = program.geometry.chunk
            chunk_tokens = chunk * program.geometry.frame_tokens(spec)
            for attention in find_attention(program, graph, spec.cross_attention, report):
                with building(attention.node) as build:
                    q = build(aten.unflatten.int, attention.q, 1, [-1, chunk_tokens])
                    q = build(aten.flatten.using_ints, q, 0, 1)
                    k, v = (
                        _repeat(build, t, batch, frames // (prompts * chunk))
                        for t in (attention.k, attention.v)
                    )
                    out = attend(build, q, k, v)
                    out = build(aten.unflatten.int, out, 0, [batch, -1])
                    out = build(aten.flatten.using_ints, out, 1, 2)
                replace(attention.result, out)
                report.match("cross-attention")
            text.meta["val"] = text.meta["val"].new_empty((batch, prompts, tokens, width))
            readers = list(text.users)
            first = next(node for node in graph.nodes if node in readers)
            with building(first, "") as build:
                flat = build(aten.flatten.using_ints, text, 0, 1)
            for reader in readers:
                reader.replace_input_with(text, flat)


def _repeat(build: Builder, value: fx.Node, batch: int, streams: int) -> fx.Node:
    """Repeat keys or values, [B·N, S, H, D] → [B·streams·N, S, H, D], the same for every stream."""
    if streams == 1:
        return value
    value = build(aten.unflatten.int, value, 0, [batch, 1, -1])
    value = build(aten.expand.default, value, [-1, streams, -1, -1, -1, -1])
    return build(aten.flatten.using_ints, value, 0, 2)
