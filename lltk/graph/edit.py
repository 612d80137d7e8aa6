"""Reading and changing a graph. Nodes carry metadata: value, module path, and an input's role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from lltk.graph.contract import Role
from lltk.graph.program import Program

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
        node.meta = {"val": _empty(like), "module": "", "role": role}
    return node


def _empty(like: Tensor) -> Tensor:
    """A tensor of ``like``'s shape, strides and dtype; a fake one under a fake mode."""
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
        return _empty(node.meta["val"])
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
    return tuple(_empty(n.meta["val"]) for n in output(region.graph).all_input_nodes)


def _infer_call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a call. ``values`` are fake tensors; those that are missing are added."""

    def value(source: fx.Node) -> Any:
        if source not in values:
            values[source] = tree_map_only(Tensor, _empty, source.meta["val"])
        return values[source]

    args, kwargs = map_arg((node.args, node.kwargs), value)
    try:
        target = op_of(node)
        assert callable(target)
        return target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        where = f"{node.name} ({module_of(node) or 'root'}): {node.target}"
        raise ValueError(f"{where} does not fit its arguments: {error}") from error
