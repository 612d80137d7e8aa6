"""Reading and changing a graph. Nodes carry metadata: value, module path, and an input's role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lltk.graph.contract import Role

aten = torch.ops.aten


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with nodes of its own; it shares only the values in their metadata."""
    copy = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = copy.node_copy(node, made.__getitem__)
    return copy


def module_of(node: fx.Node) -> str:
    """Dotted path of the module the node came from."""
    return str(node.meta.get("module", ""))


def op_of(node: fx.Node) -> Any:
    """What a call computes: its op, even where it was lowered to an implementation."""
    return node.meta.get("op", node.target)


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the node's value."""
    return tuple(int(size) for size in node.meta["val"].shape)


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    """Calls of one operator, in order."""
    return list(graph.find_nodes(op="call_function", target=target))


def role_of(node: fx.Node) -> Role | None:
    """What an input is for. A call that stands in for an input has its role too."""
    role: Role | None = node.meta.get("role")
    return role


def inputs_of(graph: fx.Graph, role: Role) -> list[fx.Node]:
    """The inputs of a role, in order."""
    return [node for node in graph.find_nodes(op="placeholder") if role_of(node) is role]


def input_of(graph: fx.Graph, role: Role) -> fx.Node:
    """The one input of a role.

    Raises:
        ValueError: there is none, or several; names those that there are.
    """
    found = inputs_of(graph, role)
    if len(found) != 1:
        have = ", ".join(
            f"{node.target} ({role_of(node) or 'no role'})"
            for node in graph.find_nodes(op="placeholder")
        )
        raise ValueError(f"{len(found)} inputs are for {role}, not one; the graph has: {have}")
    return found[0]


def output(graph: fx.Graph) -> fx.Node:
    """The output node. Its one argument is a dict of named values."""
    (node,) = graph.find_nodes(op="output")
    return node


def results_of(graph: fx.Graph) -> dict[str, fx.Node]:
    """A named graph's results, by name."""
    found: Any = output(graph).args[0]
    return dict(found)


def rename_placeholder(node: fx.Node, name: str) -> None:
    """Give an input another name in the contract."""
    node.target = name
    node._rename(name)


def add_input(graph: fx.Graph, name: str, like: Tensor, role: Role) -> fx.Node:
    """A new input after the existing ones.

    Args:
        graph: with an input at least.
        name: of the input.
        like: gives its shape, strides and dtype.
        role: what it is for.
    """
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        node = graph.placeholder(name)
    with FakeTensorMode():
        node.meta = {"val": new_like(like), "module": "", "role": role}
    return node


def new_like(like: Tensor) -> Tensor:
    """An empty tensor of ``like``'s shape, strides and dtype; a fake one under a fake mode."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


def create_call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    name: str | None = None,
) -> fx.Node:
    """A new call at the graph's insertion point; without a name it is named after its operator."""
    name = name or getattr(target, "_opname", None)
    return graph.create_node("call_function", target, args, dict(kwargs), name=name)


class Builder:
    """Inserts nodes at one place, under one module path."""

    def __init__(self, graph: fx.Graph, module: str) -> None:
        self.graph = graph
        self.module = module

    def __call__(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        node = create_call(self.graph, target, args, kwargs, name)
        node.meta = {"module": self.module}
        return node

    def attribute(self, target: str) -> fx.Node:
        """A ``get_attr`` node for a parameter or constant."""
        node = self.graph.create_node("get_attr", target, name=target.replace(".", "_"))
        node.meta = {"module": self.module}
        return node


@contextmanager
def building(before: fx.Node, module: str | None = None) -> Iterator[Builder]:
    """Insert nodes before a node; their module path is its own unless another is given."""
    with before.graph.inserting_before(before):
        yield Builder(before.graph, module_of(before) if module is None else module)


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of ``old`` read ``new``, which takes over its value, and drop ``old``."""
    new.meta.setdefault("val", old.meta["val"])
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def is_impure(node: fx.Node) -> bool:
    """Whether the node stays although nothing reads it: inputs, the output and mutations.

    fx's own rule also keeps attention, whose operator counts as random.
    """
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(op_of(node), "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def prune(graph: fx.Graph) -> int:
    """Remove nodes that nothing reads; returns how many."""
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=is_impure)
    return before - len(graph.nodes)


def drop_unused_inputs(graph: fx.Graph) -> list[str]:
    """Remove inputs that nothing reads; returns their names."""
    unused = [n for n in graph.find_nodes(op="placeholder") if not n.users]
    for node in unused:
        graph.erase_node(node)
    return [str(node.target) for node in unused]


def sort_topologically(graph: fx.Graph) -> None:
    """Move as few nodes as possible so that each comes after its inputs."""
    placed: set[fx.Node] = set()
    opened: set[fx.Node] = set()
    anchor = graph._root
    pending = list(reversed(graph.nodes))
    while pending:
        node = pending[-1]
        waiting = [source for source in node.all_input_nodes if source not in placed]
        if waiting and node not in placed:
            assert node not in opened, f"{node.name} is computed from itself"
            opened.add(node)
            pending.extend(waiting)
            continue
        pending.pop()
        if node not in placed:
            placed.add(node)
            anchor.append(node)
            anchor = node
