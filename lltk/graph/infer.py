"""Shapes and dtypes of a graph's values, computed anew after a change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from lltk.graph.edit import module_of, new_like, op_of, output
from lltk.graph.program import Program


def infer(program: Program, graph: fx.Graph) -> None:
    """Compute the shapes and dtypes of all values anew, by running the graph on fake tensors.

    A call whose arguments did not change keeps its value. A lowered call is run as the op that it
    implements, so that this works on any machine.

    Raises:
        ValueError: a call does not fit its arguments; names the node and its module.
    """
    mode = FakeTensorMode()
    values: dict[fx.Node, Any] = {}
    found: dict[str, Any] = {}
    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function":
                values[node] = node.meta["val"] = _infer_leaf(program, node)
                continue
            made_from = _made_from(node)
            if "val" not in node.meta or node.meta.get("made_from") != made_from:
                same = repr(made_from)  # equal calls of other layers
                if same not in found:
                    found[same] = _infer_call(node, values)
                values[node] = node.meta["val"] = found[same]
                node.meta["made_from"] = made_from


def _made_from(node: fx.Node) -> Any:
    """What a call's value follows from: the op, and the sizes and dtypes of its arguments."""
    arguments = map_arg((node.args, node.kwargs), lambda source: _like(source.meta["val"]))
    return op_of(node), arguments


def _like(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return [_like(part) for part in value] if isinstance(value, (tuple, list)) else value


def _infer_leaf(program: Program, node: fx.Node) -> Any:
    """The value of a node that calls no operator: input, parameter, output, call of a region."""
    if node.op == "placeholder":
        return new_like(node.meta["val"])
    if node.op == "get_attr":
        name = str(node.target)
        if name in program.weights:
            made = torch.empty(program.weights[name].shape, dtype=program.run_dtype(name))
            return made.to(memory_format=program.memory_format(name))
        constant = program.constants[name]
        return torch.empty(constant.shape, dtype=constant.dtype)
    if node.op == "output":
        return None
    region = program.regions[str(node.args[0])]
    return tuple(new_like(n.meta["val"]) for n in output(region.graph).all_input_nodes)


def _infer_call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a call. ``values`` are fake tensors; those that are missing are added."""

    def value(source: fx.Node) -> Any:
        if source not in values:
            values[source] = tree_map_only(Tensor, new_like, source.meta["val"])
        return values[source]

    args, kwargs = map_arg((node.args, node.kwargs), value)
    try:
        target = op_of(node)
        assert callable(target)
        return target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        where = f"{node.name} ({module_of(node) or 'root'}): {node.target}"
        raise ValueError(f"{where} does not fit its arguments: {error}") from error
