"""Capture a module with torch.export into a named graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind

from lltk.graph.contract import TensorSpec
from lltk.graph.edit import prune, rename_placeholder
from lltk.graph.loading import LOADING


def capture(
    build: Callable[[], nn.Module],
    inputs: Mapping[str, TensorSpec],
    outputs: Sequence[str],
    run_dtype: Callable[[str, Tensor], torch.dtype],
    options: Mapping[str, Any] | None = None,
) -> tuple[fx.Graph, dict[str, Tensor], tuple[str, ...]]:
    """Capture a module without allocating its weights.

    Args:
        build: makes the module; called under a fake mode on the CPU.
        inputs: shape, dtype and role of each forward argument, by name.
        outputs: a name for each output, in order.
        run_dtype: gives the dtype in which a parameter runs, from its name and the parameter.
        options: constant forward arguments.

    Returns:
        The graph, the parameters and the names of the buffers that the graph reads. In the graph,
        inputs are placeholders with roles, parameters and buffers are ``get_attr`` nodes under the
        module's own names, and the output is a dict. Parameters are meta tensors in their own
        dtypes.
    """
    mode = FakeTensorMode()
    with LOADING, mode, torch.no_grad():
        module = build().eval()
        stored = {n: p.to("meta") for n, p in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(run_dtype(name, parameter))
        example = {n: torch.empty(own.shape, dtype=own.dtype) for n, own in inputs.items()}
        exported = torch.export.export(module, (), {**example, **(options or {})}, strict=False)
    graph, buffers = _named_graph(exported, outputs)
    for node in graph.find_nodes(op="placeholder"):
        node.meta["role"] = inputs[str(node.target)].role
    return graph, stored, buffers


def _named_graph(
    exported: torch.export.ExportedProgram, outputs: Sequence[str]
) -> tuple[fx.Graph, tuple[str, ...]]:
    """The exported graph with a ``get_attr`` node for each parameter, where it is first read.

    torch.export makes inputs of parameters and buffers instead.
    """
    signature = exported.graph_signature
    attributes = {
        spec.arg.name: spec.target
        for spec in signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    parameters = {s.target for s in signature.input_specs if s.kind == InputKind.PARAMETER}
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}

    def value(old: fx.Node) -> fx.Node:
        if old not in made:
            target = attributes[old.name]
            made[old] = graph.create_node("get_attr", target, name=target.replace(".", "_"))
            made[old].meta = {"val": old.meta["val"], "module": target.rpartition(".")[0]}
        return made[old]

    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name not in attributes and isinstance(node.meta["val"], Tensor):
                made[node] = graph.placeholder(node.name)
                made[node].meta = {"val": node.meta["val"], "module": ""}
        elif node.op == "output":
            results = [value(n) for n in node.args[0]]
            graph.output(dict(zip(outputs, results, strict=True)))
        else:
            made[node] = graph.node_copy(node, value)
            made[node].meta = {"val": node.meta.get("val"), "module": _module_path(node)}
    prune(graph)
    for node in graph.find_nodes(op="placeholder"):
        rename_placeholder(node, str(node.target))
    buffers = {str(n.target) for n in graph.nodes if n.op == "get_attr"} - parameters
    return graph, tuple(sorted(buffers))


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""
