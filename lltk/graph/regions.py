"""Regions: finding blocks that are equal, and cutting them out as one graph.

A *body* is the nodes of one layer in one graph. Bodies whose text is equal share a region, which
gives everything that is read of any of them.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from lltk.graph.contract import Role
from lltk.graph.edit import create_call, module_of, output, prune, sort_topologically
from lltk.graph.program import Program, Region
from lltk.graph.text import print_graph
from lltk.graph.verify import is_outer


@dataclass(frozen=True)
class Body:
    """The nodes of one layer in one graph.

    Attributes:
        graph, layer: where it is.
        owner: module path of the block.
        nodes: calls, in order.
        inputs: values from outside that it reads, in order of first use.
        parameters: names of the parameters that it reads, relative to the owner, in order of first
            use.
        reads: positions in ``nodes`` of the values that something outside reads.
    """

    graph: str
    layer: int
    owner: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    reads: tuple[int, ...]


def nodes_of_pass(program: Program, graph: str) -> Iterator[fx.Node]:
    """The nodes of a graph; those of a block come once for every layer, also from a region."""
    for node in program.graphs[graph].nodes:
        if node.op == "call_module":
            yield from program.regions[str(node.args[0])].graph.nodes
        else:
            yield node


def find_bodies(program: Program, name: str) -> list[Body]:
    """The bodies of one graph, by layer."""
    members: dict[int, list[fx.Node]] = defaultdict(list)
    for node in program.graphs[name].nodes:
        layer = program.spec.layer_of(module_of(node))
        if layer is not None and node.op == "call_function" and not is_outer(node):
            members[layer].append(node)
    return [_body(program, name, layer, nodes) for layer, nodes in sorted(members.items())]


def _body(program: Program, graph: str, layer: int, nodes: list[fx.Node]) -> Body:
    inside = set(nodes)
    owner = program.spec.block.format(layer=layer)
    inputs: dict[fx.Node, None] = {}
    parameters: dict[str, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source in inside:
                continue
            if source.op == "get_attr" and str(source.target).startswith(owner + "."):
                parameters[str(source.target).removeprefix(owner + ".")] = None
            else:
                inputs[source] = None
    reads = tuple(i for i, n in enumerate(nodes) if any(u not in inside for u in n.users))
    return Body(graph, layer, owner, tuple(nodes), tuple(inputs), tuple(parameters), reads)


def cut(body: Body, names: tuple[str, ...], reads: tuple[int, ...]) -> Region:
    """A region that computes a body.

    Args:
        body: the nodes.
        names: a name for each input.
        reads: positions of the nodes whose values it gives.
    """
    graph = fx.Graph()
    made: dict[Any, fx.Node] = {}
    for source, name in zip(body.inputs, names, strict=True):
        made[source] = graph.placeholder(name)
        made[source].meta = {"val": source.meta["val"], "module": ""}
    values = {
        str(source.target): source.meta["val"]
        for node in body.nodes
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }
    for name in body.parameters:
        made[name] = graph.placeholder(name.replace(".", "_"))
        value_of = values[f"{body.owner}.{name}"]
        made[name].meta = {"val": value_of, "module": "", "role": Role.PARAMETER}

    def value(old: fx.Node) -> fx.Node:
        if old.op == "get_attr" and old not in made:
            return made[str(old.target).removeprefix(body.owner + ".")]
        return made[old]

    for node in body.nodes:
        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        made[node] = create_call(graph, node.target, args, kwargs)
        inner = module_of(node).removeprefix(body.owner).removeprefix(".")
        made[node].meta = {"val": node.meta["val"], "module": inner}
    graph.output(tuple(made[body.nodes[position]] for position in reads))
    return Region(graph, names, body.parameters)


def extract_regions(program: Program) -> dict[str, int]:
    """Replace every layer's body by a call of its owner, and fill ``program.regions``.

    Returns:
        Calls by region name.
    """
    groups: dict[str, list[Body]] = defaultdict(list)
    for name in program.graphs:
        for body in find_bodies(program, name):
            generic = tuple(f"in_{i}" for i in range(len(body.inputs)))
            text = print_graph(cut(body, generic, ()).graph, "body")
            groups[text].append(body)
    shared = []
    for bodies in groups.values():
        reads = tuple(sorted(set[int]().union(*(body.reads for body in bodies))))
        name = _region_name(program, bodies)
        region = cut(bodies[0], _input_names(program, bodies), reads)
        callers = frozenset(body.graph for body in bodies)
        program.regions[name] = replace(region, callers=callers)
        shared.append((name, reads, bodies))
    moved: dict[fx.Node, fx.Node] = {}
    for name, reads, bodies in shared:
        for body in bodies:
            _call(program.graphs[body.graph], body, name, reads, moved)
    for graph in program.graphs.values():
        sort_topologically(graph)
        prune(graph)
    return {name: len(bodies) for name, _, bodies in shared}


def _region_name(program: Program, bodies: list[Body]) -> str:
    graph = bodies[0].graph
    layers = [body.layer for body in bodies if body.graph == graph]
    if len(layers) == program.spec.layers:
        return f"{graph}_block"
    return f"{graph}_block_{'_'.join(map(str, layers))}"


def _input_names(program: Program, bodies: list[Body]) -> tuple[str, ...]:
    """Names for a region's inputs.

    An input from outside of the blocks keeps the name that it has for every layer, less the layer
    where the name ends in it. What one block hands to the next is called ``tokens``.
    """
    same_graph = [body for body in bodies if body.graph == bodies[0].graph]
    names: list[str] = []
    for position, first in enumerate(bodies[0].inputs):
        sources = {body.inputs[position] for body in same_graph}
        stem, *others = {_stem(body.inputs[position], body.layer) for body in same_graph}
        outside = all(program.spec.layer_of(module_of(source)) is None for source in sources)
        if outside and stem is not None and not others:
            name = stem
        elif first.op == "placeholder" or (outside and len(sources) == 1):
            name = first.name
        else:
            name = "tokens"
        names.append(f"{name}_{position}" if name in names else name)
    return tuple(names)


def _stem(source: fx.Node, layer: int) -> str | None:
    """A node's name without the layer that it ends in; None if it does not."""
    stem, _, number = source.name.rpartition("_")
    return stem if number == str(layer) else None


def _call(
    graph: fx.Graph, body: Body, region: str, reads: tuple[int, ...], moved: dict[fx.Node, fx.Node]
) -> None:
    """Put one call of the owner in the place of the body's nodes."""
    inputs = tuple(moved.get(source, source) for source in body.inputs)
    with graph.inserting_before(output(graph)):
        call = graph.create_node("call_module", body.owner, (region, *inputs))
        call.meta = {"module": body.owner}
        for index, position in enumerate(reads):
            old = body.nodes[position]
            new = graph.call_function(operator.getitem, (call, index))
            new.meta = {"val": old.meta["val"], "module": body.owner}
            old.replace_all_uses_with(new)
            moved[old] = new
    for node in reversed(body.nodes):
        graph.erase_node(node)
