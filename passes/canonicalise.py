"""The canonical form: what only capture needs is dropped, and RoPE becomes functional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lltk.graph.edit import Builder, building, calls, module_of, prune, replace, shape
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.regions import find_bodies
from lltk.graph.spec import ModelSpec
from lltk.graph.stages import Stage

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.type_as.default)


class Config(PassConfig):
    """Nothing to configure."""


class Canonicalise(Pass[Config]):
    """Drop metadata checks, inactive dropout and useless casts, and make RoPE functional.

    ::

        y = empty_like(x); copy_(y[..., 0::2], a); copy_(y[..., 1::2], b)
            →  y = flatten(stack([a, b], -1), -2)
        to(x: f32, f32)  →  x          type_as(x, y)  →  to(x, y's dtype)
        slice(x, 2, 0, x's frames)  →  x     pad(x, [0, …])  →  x      clone(x)  →  x
        exp(arange(…) * c)  →  a constant

    A clone that is an output stays, because what it copies may be a slice of something larger.

    A canonical graph is right only for the dtypes that it was captured with, as they decide which
    casts change nothing.
    """

    Config = Config
    reads = (Stage.CAPTURED,)
    leaves = Stage.CANONICAL
    kinds = (*Pass.kinds, "decode", "encode", "text")
    numerics = Numerics.BITWISE

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in list(graph.nodes):
                if node.op == "call_function":
                    _simplify(node, report)
            for node in calls(graph, aten.empty_like.default):
                _functional_rope(node, report)
            for node in calls(graph, aten.clone.default):
                _drop_clone(node, report)
            prune(graph)
            _fold_constants(program, graph, report)

    def ensures(self, program: Program) -> None:
        if not isinstance(program.model, ModelSpec):
            return
        for name in program.graphs:
            bodies = find_bodies(program, name)
            assert len(bodies) == program.spec.layers, f"{name}: a block is missing"
            shapes = {(len(b.nodes), len(b.inputs), b.parameters) for b in bodies}
            assert len(shapes) == 1, f"{name}: blocks differ: {shapes}"


def _dtype(node: Any) -> torch.dtype:
    value: Tensor = node.meta["val"]
    return value.dtype


def _simplify(node: fx.Node, report: Report) -> None:
    if node.target is aten._assert_tensor_metadata.default:
        node.graph.erase_node(node)
        report.match("checks")
    elif node.target is aten.dropout.default:
        source, probability, training = node.args
        assert isinstance(source, fx.Node)
        if probability == 0 or not training:
            replace(node, source)
            report.match("dropout")
        else:
            report.miss(node, f"dropout with p={probability} is active")
    elif node.target in _CASTS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if _dtype(source) == _dtype(node):
            replace(node, source)
            report.match("casts")
        elif node.target is not aten.to.dtype:
            with building(node) as build:
                replace(node, build(aten.to.dtype, source, _dtype(node)))
            report.match("casts")
    elif node.target is aten.contiguous.default:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].is_contiguous():
            replace(node, source)
            report.match("copies")
    elif _is_identity(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        replace(node, source)
        report.match("identities")


def _is_identity(node: fx.Node) -> bool:
    if node.target is aten.slice.Tensor:
        return shape(node) == shape(node.all_input_nodes[0])
    if node.target is aten.pad.default:
        return not any(node.args[1])  # type: ignore[arg-type]
    return node.target is aten.alias.default


def _drop_clone(clone: fx.Node, report: Report) -> None:
    """Drop a copy. To be called once nothing mutates any more, as copies then only cost time."""
    source = clone.args[0]
    assert isinstance(source, fx.Node)
    if not any(user.op == "output" for user in clone.users):
        replace(clone, source)
        report.match("copies")


def _functional_rope(empty: fx.Node, report: Report) -> None:
    """Replace an ``empty_like`` that two strided copies fill by stack and flatten."""
    halves: dict[int, fx.Node] = {}
    copies: list[fx.Node] = []
    for view in empty.users:
        writes = [user for user in view.users if user.target is aten.copy_.default]
        if view.target is aten.slice.Tensor and view.args[4:] == (2,) and writes:
            start, written = view.args[2], writes[0].args[1]
            assert isinstance(start, int) and isinstance(written, fx.Node)
            halves[start] = written
            copies += [writes[0], view]
    if halves.keys() != {0, 1}:
        report.miss(empty, "is not filled by two strided copies")
        return
    last = max(c for c in copies if c.target is aten.copy_.default)
    with empty.graph.inserting_after(last):
        build = Builder(empty.graph, module_of(empty))
        stacked = build(aten.stack.default, [halves[0], halves[1]], -1)
    with empty.graph.inserting_after(stacked):
        rotated = build(aten.flatten.using_ints, stacked, -2)
    if _dtype(halves[0]) != _dtype(empty):
        with empty.graph.inserting_after(rotated):
            rotated = build(aten.to.dtype, rotated, _dtype(empty))
    for node in copies:
        node.graph.erase_node(node)
    replace(empty, rotated)
    report.match("rope")


def _fold_constants(program: Program, graph: fx.Graph, report: Report) -> None:
    """Compute what depends on no input or parameter, and make constants of what others read."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "call_function" and all(source in values for source in node.all_input_nodes):
            args, kwargs = (map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
            values[node] = node.target(*args, **kwargs)
    for node in [node for node in values if node.users.keys() - values.keys()]:
        name = f"{module_of(node)}.{node.name}".lstrip(".")
        program.constants[name] = values[node]
        with building(node) as build:
            replace(node, build.attribute(name))
        report.match("constants")
