"""The forward and backward pass of a block as one graph, to look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode

from lltk.graph.edit import copy_graph, output, rename_placeholder, role_of
from lltk.graph.program import Region


def joint_graph(region: Region) -> fx.Graph:
    """The graph that autograd makes of a region.

    Its inputs are the region's inputs, the region's parameters, and the gradients of the region's
    outputs, called ``grad_0``, ``grad_1`` and so on. It gives the outputs by name, ``output_0`` and
    so on, and the gradient of every input and parameter that has one, as ``grad_<name>``.
    """
    read = region.graph.find_nodes(op="placeholder")
    module = fx.GraphModule(torch.nn.Module(), region.graph)
    with FakeTensorMode():
        given = [_like(node.meta["val"]) for node in read]
    joint: Any = aot_export_joint_simple(module.forward, tuple(given), trace_joint=True)
    graph = copy_graph(joint.graph)
    inputs, end = graph.find_nodes(op="placeholder"), output(graph)
    (values,) = end.args
    assert isinstance(values, (list, tuple))
    count = len(inputs) - len(read)
    names = [str(node.target) for node in read]
    for node, name in zip(inputs, [*names, *(f"grad_{i}" for i in range(count))], strict=True):
        rename_placeholder(node, name)
    for node, source in zip(inputs, read, strict=False):
        node.meta["role"] = role_of(source)
    gradients = dict(zip((f"grad_{name}" for name in names), values[count:], strict=True))
    results = {f"output_{i}": value for i, value in enumerate(values[:count])}
    end.args = (results | {name: value for name, value in gradients.items() if value is not None},)
    return graph


def _like(value: Tensor) -> Tensor:
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return made.requires_grad_(value.is_floating_point() and value.dtype.itemsize > 1)
