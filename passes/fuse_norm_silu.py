"""The input of a causal convolution, made by one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lltk.graph.edit import building, calls, module_of, output, shape
from lltk.graph.match import before_cast
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.spec import CachedSpec
from lltk.graph.stages import Stage
from lltk.ops.cached_norm_silu.reference import CACHED, EPS
from lltk.ops.implementations import overload

aten = torch.ops.aten
CACHED_NORM_SILU = overload("cached_norm_silu")
_CONV = aten.conv3d.default
_MOVES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.slice.Tensor,
    aten.pad.default,
    aten.cat.default,
}
"""The operations that make a cache of what the convolution reads."""


class Config(PassConfig):
    """Nothing to configure."""


@dataclass(frozen=True)
class _Input:
    """The input of a causal convolution over three frames.

    Attributes:
        source: what the norm reads.
        readers: the norm's nodes that read it.
        gamma: name of the norm's weight.
        silu: the SiLU of the norm.
        cache: frames of the calls before; None where zeros stand for them.
        side: how many zeros pad an image on each side.
    """

    source: fx.Node
    readers: frozenset[fx.Node]
    gamma: str
    silu: fx.Node
    cache: fx.Node | None
    side: int


class FuseNormSilu(Pass[Config]):
    """Make the input of a convolution in one op: bias, residual, norm, SiLU and cached frames.

    ::

        s = conv3d(…, bias) + residual
        y = silu(normalize(s) * √C * gamma)        frames, next_cache, s = cached_norm_silu(
        next_cache = clone(y[:, :, -2:])        →      conv3d(…), gamma, bias, residual, cache,
        conv3d(pad(cat([cache, y])))                   keep)
                                                   conv3d(frames, padding=(0, 1, 1))

    The op also gives the sum s where something else reads it. In ``first`` there is no cache, and
    zeros stand for the frames before. Sum and norm are rounded once, where the model rounds after
    every operation.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    kinds = ("decode", "encode")
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        assert isinstance(program.model, CachedSpec)
        for graph in program.graphs.values():
            for conv in calls(graph, _CONV):
                found = _match(conv, report)
                if found is not None:
                    _fuse(conv, found, program.model, report)

    def ensures(self, program: Program) -> None:
        for name, graph in program.graphs.items():
            left = [node.name for node in calls(graph, aten.silu.default)]
            assert not left, f"{name}: {left} were not fused"


def _fuse(conv: fx.Node, found: _Input, spec: CachedSpec, report: Report) -> None:
    source = found.source
    x, residual, bias = source, None, None
    pair = source.all_input_nodes
    if source.target is aten.add.Tensor and len(pair) == 2:
        own = [node for node in pair if _is_biased(node) and list(node.users) == [source]]
        if own and shape(own[0]) == shape(source):
            x, residual = own[0], pair[1 - pair.index(own[0])]
    others = [user for user in source.users if user not in found.readers]
    absorbed = _is_biased(x)
    with building(source.next, module_of(found.silu)) as build:
        if absorbed:
            bias = _take_bias(x)
            if residual is not None and _is_biased(residual) and list(residual.users) == [source]:
                bias = build(aten.add.Tensor, bias, _take_bias(residual))
        gamma = build.attribute(found.gamma)
        keep = absorbed and bool(others)
        made = build(CACHED_NORM_SILU, x, gamma, bias, residual, found.cache, keep)
        frames, cache = (build(operator.getitem, made, index) for index in range(2))
        if keep:
            total = build(operator.getitem, made, 2)
            for user in others:
                user.replace_input_with(source, total)
    conv.args = (frames, *conv.args[1:3], [1, 1, 1], [0, found.side, found.side])
    _give_cache(conv.graph, found.silu, cache, spec)
    report.match("convolutions")
    report.match("biases", int(bias is not None))
    report.match("residuals", int(residual is not None))


def _is_biased(node: fx.Node) -> bool:
    """Whether it is a convolution with a bias."""
    return node.target is _CONV and isinstance(node.args[2], fx.Node)


def _take_bias(conv: fx.Node) -> fx.Node:
    """Take its bias from a convolution."""
    bias = conv.args[2]
    assert isinstance(bias, fx.Node)
    conv.update_arg(2, None)
    return bias


def _give_cache(graph: fx.Graph, silu: fx.Node, cache: fx.Node, spec: CachedSpec) -> None:
    """Let the graph give ``cache`` in the place of the cache that it makes of ``silu``."""
    values: dict[str, fx.Node] = output(graph).args[0]  # type: ignore[assignment]
    names = [name for name in spec.cache_outputs if _is_made_of(values[name], silu)]
    assert len(names) == 1, f"{silu.name} is kept as {names}"
    values[names[0]].replace_all_uses_with(cache)


def _is_made_of(node: fx.Node, source: fx.Node) -> bool:
    if node.target not in _MOVES:
        return node is source
    return any(_is_made_of(read, source) for read in node.all_input_nodes)


def _match(conv: fx.Node, report: Report) -> _Input | None:
    pad = conv.args[0]
    assert isinstance(pad, fx.Node)
    if pad.target is not aten.pad.default or len(conv.args) > 3:
        report.miss(conv, "does not read padded frames")
        return None
    inner, amounts, cache = pad.args[0], pad.args[1], None
    assert isinstance(inner, fx.Node)
    if inner.target is aten.cat.default and inner.args[1] == 2 and len(inner.all_input_nodes) == 2:
        cache, inner = inner.all_input_nodes
    side = amounts[0] if isinstance(amounts, list) else None
    if not isinstance(side, int) or amounts != [side] * 4 + [CACHED if cache is None else 0, 0]:
        report.miss(conv, f"its input is padded by {amounts}")
        return None
    if inner.target is not aten.silu.default:
        report.miss(conv, f"its input is made by {inner.target}, not by SiLU")
        return None
    norm = _match_norm(inner.all_input_nodes[0])
    if norm is None:
        report.miss(inner, "does not follow an RMS norm over channels")
        return None
    return _Input(*norm, inner, cache, side)


def _match_norm(node: fx.Node) -> tuple[fx.Node, frozenset[fx.Node], str] | None:
    """What an RMS norm reads, the norm's nodes that read it, and its weight's name; or None."""
    if node.target is aten.add.Tensor and node.args[1] == 0.0:
        node = node.all_input_nodes[0]
    if node.target is not aten.mul.Tensor:
        return None
    scaled, gamma = node.args
    if not isinstance(scaled, fx.Node) or scaled.target is not aten.mul.Tensor:
        return None
    normed, root = scaled.args
    assert isinstance(normed, fx.Node) and isinstance(gamma, fx.Node)
    if gamma.op != "get_attr" or root != shape(node)[1] ** 0.5:
        return None
    divided = before_cast(normed)
    if divided.target is not aten.div.Tensor:
        return None
    wide, length = divided.all_input_nodes
    clamped = length.all_input_nodes[0]
    if length.target is not aten.expand_as.default or clamped.args[1:] != (EPS,):
        return None
    if clamped.all_input_nodes[0].args != (wide, 2.0, [1], True):
        return None
    source = before_cast(wide)
    readers = {wide} if source is not wide else set(wide.users) & _used_by(divided)
    return source, frozenset(readers), str(gamma.target)


def _used_by(divided: fx.Node) -> set[fx.Node]:
    """The nodes of a norm up to its quotient."""
    length = divided.all_input_nodes[1]
    clamped = length.all_input_nodes[0]
    return {divided, length, clamped, clamped.all_input_nodes[0]}
