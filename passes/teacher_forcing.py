"""The train graph: a clip's clean and noisy latents in one forward."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from lltk.graph.contract import Role
from lltk.graph.edit import (
    Builder,
    add_input,
    building,
    input_of,
    inputs_of,
    module_of,
    rename_placeholder,
    shape,
)
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.passes.block_causal import rewrite_self_attention

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure."""


class TeacherForcing(Pass[Config]):
    """Run a clip's clean and noisy latents as one sequence, and predict for the noisy half.

    ::

        latents: [B, C, 2F, h, w]  →  cat(clean: [B, C, F, h, w], noisy, dim=2)
        times: [B, 2F], positions: [2F]  →  cat(0, times: [B, F]), cat(positions, positions)
        attend(q, k, v)  →  lltk.block_causal_attention(q, k, v, chunk tokens, True)
        head(x)  →  head(noisy half of x)

    A clean chunk sees the clean chunks up to its own. A noisy chunk sees the earlier clean chunks
    and itself. The pass needs timesteps per frame and frame positions.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    leaves = Stage.CAUSAL
    kinds = ("train",)
    numerics = Numerics.CHANGING

    def requires(self, program: Program) -> None:
        (graph,) = program.graphs.values()
        time = input_of(graph, Role.TIME)
        if not inputs_of(graph, Role.POSITIONS) or shape(time)[1] != 2 * program.geometry.frames:
            raise ValueError(
                "needs timesteps and positions per frame; put "
                "per_frame_timesteps and frame_positions before it in the recipe's passes"
            )

    def apply(self, program: Program, report: Report) -> None:
        (graph,) = program.graphs.values()
        frames = program.geometry.frames
        _noisy_head(program, graph, frames, report)
        noisy = input_of(graph, Role.LATENTS)
        like = noisy.meta["val"].narrow(2, 0, frames).contiguous()
        clean = add_input(graph, "clean", like, Role.CLEAN)
        _double(noisy, 2, lambda build: clean)
        rename_placeholder(noisy, "noisy")
        time = input_of(graph, Role.TIME)
        _double(time, 1, lambda build: build(aten.zeros_like.default, time))
        positions = input_of(graph, Role.POSITIONS)
        _double(positions, 0, lambda build: positions)
        report.match("inputs", 3)
        rewrite_self_attention(program, "train", True, report)


def _double(source: fx.Node, axis: int, other: Callable[[Builder], fx.Node]) -> None:
    """Halve an input along an axis; its readers then read ``other`` and the input, joined."""
    readers = [node for node in source.graph.nodes if node in source.users]
    with building(readers[0], "") as build:
        joined = build(aten.cat.default, [other(build), source], axis)
    for reader in readers:
        reader.replace_input_with(source, joined)
    half = source.meta["val"].shape[axis] // 2
    source.meta["val"] = source.meta["val"].narrow(axis, 0, half).contiguous()


def _noisy_head(program: Program, graph: fx.Graph, frames: int, report: Report) -> None:
    """Keep the second half of the tokens, and of what is per frame, after the last block."""
    spec = program.spec
    blocks = {node for node in graph.nodes if spec.layer_of(module_of(node)) is not None}
    head: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in blocks:
            continue
        from_blocks = [source for source in node.all_input_nodes if source in blocks]
        if not from_blocks and not head & set(node.all_input_nodes):
            continue
        for source in node.all_input_nodes:
            if source not in head and source.op == "call_function":
                with building(node) as build:
                    halves = build(aten.chunk.default, source, 2, 1)
                    half = build(operator.getitem, halves, 1)
                node.replace_input_with(source, half)
                report.match("head")
        if node.target is aten.reshape.default:
            batch, both, *rest = shape(node)
            assert both == 2 * frames
            node.update_arg(1, [batch, -1, *rest])
        head.add(node)
