"""Causal convolutions in W8A8: weights and frames are FP8."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import fx

from lltk.graph.contract import TensorSpec
from lltk.graph.edit import building, op_of, replace, shape
from lltk.graph.linears import Pattern
from lltk.graph.packed import FP8_ENDINGS, Fp8Weights
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

aten = torch.ops.aten
NORM_SILU = overload("cached_norm_silu")
FP8_NORM_SILU = overload("fp8_cached_norm_silu")
FP8_CONV = overload("fp8_conv3d")
MULTIPLE = 16
"""Tensor cores want both widths to be multiples of it."""
_CACHE, _SUM = 1, 2
"""Which of `cached_norm_silu`'s results these are."""


class Config(PassConfig):
    """Which convolutions."""

    exclude: tuple[Pattern, ...] = Field(
        (r"(de|en)coder\.conv_out",), description="modules to keep (whole-path regexes)"
    )


@dataclass(frozen=True)
class _Convolution:
    """A causal convolution, the op that makes what it reads, and its module path."""

    node: fx.Node
    made: fx.Node
    module: str


class Fp8Convolve(Pass[Config]):
    """Convolve in FP8 what `fuse_norm_silu` made, with caches in FP8 too.

    ::

        frames, next_cache, s = cached_norm_silu(…, cache, keep)
        conv3d(frames, W, b, padding=(0, 1, 1))
            →  frames, next_cache, scale, s = fp8_cached_norm_silu(…, cache, keep)
               fp8_conv3d(frames, scale, values, row scales, b)

    ``<module>.weight`` becomes ``<module>.weight_values`` [O, 27 · C], and a scale for each row,
    ``<module>.weight_row_scales``. A norm bounds its results, so the frames' one scale follows from
    the norm and need not be measured. Convolutions stay as they are where a width is no multiple of
    16. So does the last one, which makes pixels or latents, unless ``exclude`` says otherwise.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    kinds = ("decode", "encode")
    numerics = Numerics.CHANGING

    def apply(self, program: Program, report: Report) -> None:
        chosen = [
            found
            for graph in program.graphs.values()
            for node in graph.nodes
            if op_of(node) is aten.conv3d.default
            if (found := self._match(node, report)) is not None
        ]
        before = {conv.module: TensorSpec.of(_weight(conv.node).meta["val"]) for conv in chosen}
        program.change_weights(Fp8Weights(before))
        for conv in chosen:
            _rewrite(conv)
            report.match("convolutions")

    def _match(self, conv: fx.Node, report: Report) -> _Convolution | None:
        if conv.target is not aten.conv3d.default:
            report.miss(conv, "is chosen by another pass; run that behind fp8_convolve")
            return None
        frames, weight = conv.args[0], _weight(conv)
        assert isinstance(frames, fx.Node)
        made = frames.args[0] if frames.target is operator.getitem else None
        if not isinstance(made, fx.Node) or made.target is not NORM_SILU:
            report.miss(conv, "does not read what fuse_norm_silu made; run that before")
            return None
        outer, inner, *taps = shape(weight)
        causal = taps == [3, 3, 3] and conv.args[3:] == ([1, 1, 1], [0, 1, 1])
        if not causal or list(frames.users) != [conv]:
            report.miss(conv, "is no causal 3×3×3 convolution with frames of its own")
            return None
        module = str(weight.target).removesuffix(".weight")
        for pattern in self.config.exclude:
            if re.fullmatch(pattern, module):
                report.keep(conv, module, f"excluded by {pattern!r}")
                return None
        odd = [f"{what} {n}" for what, n in (("in", inner), ("out", outer)) if n % MULTIPLE]
        if odd:
            report.keep(conv, module, f"{' and '.join(odd)} channels: no multiple of {MULTIPLE}")
            return None
        return _Convolution(conv, made, module)


def _weight(conv: fx.Node) -> fx.Node:
    weight = conv.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def _rewrite(conv: _Convolution) -> None:
    made, node = conv.made, conv.node
    parts = {part.args[1]: part for part in made.users}
    with building(made) as build:
        fp8 = build(FP8_NORM_SILU, *made.args)
        items = [build(operator.getitem, fp8, index) for index in range(3 + (_SUM in parts))]
    cache = made.args[4]
    if isinstance(cache, fx.Node):
        cache.meta["val"] = cache.meta["val"].to(torch.float8_e4m3fn)
    with building(node) as build:
        weight = [build.attribute(conv.module + ending) for ending in FP8_ENDINGS]
        bias, dtype = node.args[2], node.meta["val"].dtype
        replace(node, build(FP8_CONV, items[0], items[2], *weight, bias, dtype))
    for index, now in ((_CACHE, items[_CACHE]), (_SUM, items[-1])):  # the sum follows the scale
        if index in parts:
            parts[index].replace_all_uses_with(now)
