"""Convolutions over the images themselves instead of over enlarged images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lltk.graph.edit import building, calls, replace, shape
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload
from lltk.ops.upsample_residual.reference import fold, unfold

aten = torch.ops.aten
UPSAMPLE_RESIDUAL = overload("upsample_residual")
_WEIGHT, _PHASES = "weight", "phases"


class Config(PassConfig):
    """Nothing to configure."""


@dataclass(frozen=True)
class _Upsampling:
    """An upsampling and its shortcut.

    Attributes:
        image: [B·F, C, h, w], before it is enlarged.
        module: path of the convolution, whose weight is [O, C, 3, 3].
        bias: the convolution's bias.
        shortcut: [B, C', T, h, w], before it is enlarged.
        stride: how many frames a frame of the shortcut becomes.
        result: the sum of both.
    """

    image: fx.Node
    module: str
    bias: fx.Node
    shortcut: fx.Node
    stride: int
    result: fx.Node


@dataclass(frozen=True)
class _FoldedWeights:
    """The state map of folded convolutions: ``<module>.weight`` becomes ``<module>.phases``."""

    modules: frozenset[str]

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fold the convolutions' weights."""
        return self._changed(state, _WEIGHT, _PHASES, fold)

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unfold them; rounding apart, this is exact."""
        return self._changed(state, _PHASES, _WEIGHT, unfold)

    def _changed(
        self, state: Mapping[str, Tensor], old: str, new: str, change: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        mapped = dict(state)
        for module in self.modules:
            if f"{module}.{old}" in mapped:
                mapped[f"{module}.{new}"] = change(mapped.pop(f"{module}.{old}"))
        return mapped


class FoldUpsample(Pass[Config]):
    """Convolve small images with folded weights, then interleave and add the shortcut in one op.

    ::

        conv2d(nearest(x, 2×), weight: [O, C, 3, 3], bias) + copies(shortcut)
            →  upsample_residual(conv2d(x, phases: [4·O, C, 2, 2]), bias, shortcut, stride)

    Three rows of the enlarged image are two rows of the image. So 4 · 4 products for a pixel of the
    image do what 4 · 9 did, and neither enlarged image is written. The casts around the enlarging
    go too, since copying rounds nothing. ``<module>.weight`` becomes ``<module>.phases``.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    kinds = ("decode",)
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        modules = set()
        for graph in program.graphs.values():
            for conv in calls(graph, aten.conv2d.default):
                found = _match(conv, report)
                if found is not None:
                    _rewrite(found)
                    modules.add(found.module)
                    report.match("upsamplings")
        program.change_weights(_FoldedWeights(frozenset(modules)))


def _rewrite(found: _Upsampling) -> None:
    with building(found.result, found.module) as build:
        weight = build.attribute(f"{found.module}.{_PHASES}")
        phases = build(aten.conv2d.default, found.image, weight, None, [1, 1], [1, 1])
        made = build(UPSAMPLE_RESIDUAL, phases, found.bias, found.shortcut, found.stride)
    replace(found.result, made)


def _match(conv: fx.Node, report: Report) -> _Upsampling | None:
    """The upsampling that a convolution is a part of, or None."""
    source, weight, bias, *rest = conv.args
    source = _behind(source, aten.to.dtype)
    if source.target is not aten._upsample_nearest_exact2d.vec or source.args[2] != [2.0, 2.0]:
        report.miss(conv, "does not read an image enlarged twofold")
        return None
    assert isinstance(weight, fx.Node) and isinstance(bias, fx.Node)
    if shape(weight)[2:] != (3, 3) or rest != [[1, 1], [1, 1]]:
        report.miss(conv, "is no 3×3 convolution that keeps its image's size")
        return None
    node = conv
    for target in (aten.view.default, aten.permute.default):
        (node, *more) = node.users
        if more or node.target is not target:
            report.miss(conv, "is not put back among its clip's frames alone")
            return None
    (add, *more) = node.users
    if more or add.target is not aten.add.Tensor or add.args[0] is not node:
        report.miss(conv, "is not added to a shortcut")
        return None
    spread = _behind(add.args[1], aten.slice.Tensor)
    chain = [aten.view.default, aten.contiguous.default, aten.permute.default, aten.view.default]
    for target in chain:
        if spread.target is not target:
            report.miss(conv, f"its shortcut ends in {spread.target}, not in copies")
            return None
        apart, (spread, *_) = spread, spread.all_input_nodes
    if spread.target is not aten.repeat_interleave.self_int or spread.args[2] != 1:
        report.miss(conv, f"its shortcut ends in {spread.target}, not in copies")
        return None
    shortcut, image = spread.args[0], _behind(source.args[0], aten.to.dtype)
    assert isinstance(shortcut, fx.Node)
    module = str(weight.target).removesuffix(f".{_WEIGHT}")
    return _Upsampling(image, module, bias, shortcut, shape(apart)[2], add)


def _behind(node: object, target: object) -> fx.Node:
    """The first argument of a call of ``target``; the node itself if it is no such call."""
    assert isinstance(node, fx.Node)
    source = node.args[0] if node.target is target else node
    assert isinstance(source, fx.Node)
    return source
