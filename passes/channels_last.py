"""Channels last in memory, for an autoencoder's weights and images."""

from __future__ import annotations

import torch
from torch import fx

from lltk.graph.edit import building, calls, module_of, output, replace, results_of, shape
from lltk.graph.facts import ChannelsLastWeights
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.spec import CachedSpec
from lltk.graph.stages import Stage

aten = torch.ops.aten


class Config(PassConfig):
    """Nothing to configure."""


class ChannelsLast(Pass[Config]):
    """Keep channels last in memory: in weights, from loading on, and so in images.

    ::

        conv3d(x, weight), conv2d(x, weight)  →  the same, with the weight's channels last
        reshape(stack([x[:, :C], x[:, C:]], 3))  →  the same frames, made by moving whole pixels
        mean(view(contiguous(permute(view(x)))))  →  the same averages of whole pixels
        next_cache = contiguous(…)  →  next_cache = clone(…) with channels last

    The result of a convolution lies in memory as its weight does, and what follows keeps it so.
    Names, shapes and values stay. cuDNN uses other kernels, which round sums differently.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    kinds = ("decode", "encode")
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        assert isinstance(program.model, CachedSpec)
        weights = set()
        for graph in program.graphs.values():
            for target in (aten.conv3d.default, aten.conv2d.default):
                for conv in calls(graph, target):
                    weight = conv.args[1]
                    assert isinstance(weight, fx.Node)
                    weights.add(str(weight.target))
            for stack in calls(graph, aten.stack.default):
                _interleave(stack, report)
            for mean in calls(graph, aten.mean.dim):
                _average(mean, report)
            for name in program.model.cache_outputs:
                _lay_out(results_of(graph)[name], report)
        program.leave(ChannelsLastWeights(frozenset(weights)))
        report.match("weights", len(weights))


def _lay_out(cache: fx.Node, report: Report) -> None:
    """Let a cache that is copied lie with channels last, alike in all graphs.

    Compilers tell even those strides apart that no element depends on.
    """
    if cache.target not in (aten.clone.default, aten.contiguous.default, aten.pad.default):
        return
    end = output(cache.graph)
    source = cache if cache.target is aten.pad.default else cache.all_input_nodes[0]
    with building(end, module_of(cache)) as build:
        copy = build(aten.clone.default, source, memory_format=torch.channels_last_3d)
    end.replace_input_with(cache, copy)
    report.match("caches")


def _interleave(stack: fx.Node, report: Report) -> None:
    """Make frames of the two halves of the channels by moving whole pixels."""
    parts, (end, *more) = stack.all_input_nodes, stack.users
    halves = parts[0].all_input_nodes[0]
    picked = [(aten.select.int, (halves, 1, index)) for index in range(2)]
    if [(part.target, part.args) for part in parts] != picked or stack.args[1:] != (3,):
        report.miss(stack, "does not make frames of halves of channels")
        return
    if more or end.target is not aten.reshape.default or len(shape(end)) != 5:
        report.miss(stack, "is not followed by its frames alone")
        return
    batch, channels, frames, *sides = shape(end)
    with building(end) as build:
        moved = build(aten.permute.default, halves, [0, 3, 1, 4, 5, 2])
        moved = build(aten.contiguous.default, moved)
        moved = build(aten.view.default, moved, [batch, frames, *sides, channels])
        moved = build(aten.permute.default, moved, [0, 4, 1, 2, 3])
    replace(end, moved)
    report.match("interleaved frames")


def _average(mean: fx.Node, report: Report) -> None:
    """Average pixels where they are, in the shortcut of a block that makes images smaller.

    There x [B, C, T·t, H·s, W·s] becomes [B, C·t·s·s, T, H, W], each block of t·s·s pixels being
    channels. The mean is of groups of these channels.
    """
    node = mean
    for target in (aten.view.default, aten.view.default, aten.permute.default, aten.view.default):
        (node, *_) = node.all_input_nodes
        if node.target is aten.contiguous.default:
            (node,) = node.all_input_nodes
        if node.target is not target:
            report.miss(mean, f"averages over what {node.target} makes, not over blocks of pixels")
            return
    (source,) = node.all_input_nodes
    batch, channels, frames, t, height, s, width, _ = shape(node)
    group, result = shape(mean.all_input_nodes[0])[2], shape(mean)
    kept = {2: t, 4: s, 6: s}  # axes of a block below, and their sizes
    for axis in (6, 4, 2):
        if group % kept[axis] == 0:
            group //= kept.pop(axis)
    if mean.args[1:] != ([2],) or group != 1:
        report.miss(mean, "does not average whole axes of blocks of pixels")
        return
    if shape(source) == result:  # blocks of one pixel
        replace(mean, source)
        report.match("averages of one pixel")
        return
    with building(mean) as build:
        made = build(aten.permute.default, source, [0, 2, 3, 4, 1])
        blocks = [batch, frames, t, height, s, width, s, channels]
        made = build(aten.reshape.default, made, blocks)
        order = [0, 1, 3, 5, 7, *kept]
        averaged = [axis for axis in (2, 4, 6) if axis not in kept]
        made = build(aten.mean.dim, made, averaged, True)
        made = build(aten.permute.default, made, [*order, *averaged])
        made = build(aten.reshape.default, made, [batch, *result[2:], result[1]])
        made = build(aten.permute.default, made, [0, 4, 1, 2, 3])
    replace(mean, made)
    report.match("averages")
