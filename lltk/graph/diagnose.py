"""Finding the first value of a forward pass that is not finite."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lltk.graph.edit import module_of
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program


class _Found(Exception):
    """A value that is not finite was found. fx adds to the message, but not to ``where``."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


class _Watch(fx.Interpreter):
    """Runs a graph node by node, and what is inside of regions too, until a value is not finite.

    Args:
        program: the Program that the graph or region belongs to.
        root: the module that holds what the graph reads.
        graph: what to run.
        labels: what to call each input; None for an input that is not looked at.
        owner: path of the block that a region runs for.
    """

    def __init__(
        self,
        program: Program,
        root: nn.Module,
        graph: fx.Graph,
        labels: Iterable[str | None],
        owner: str = "",
    ) -> None:
        super().__init__(fx.GraphModule(root, graph))
        self._program = program
        self._owner = owner
        self._labels = dict(zip(graph.find_nodes(op="placeholder"), labels, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        where = self._describe(n)
        if where is not None and not _finite(value):
            raise _Found(where)
        return value

    def _describe(self, node: fx.Node) -> str | None:
        if node in self._labels:
            return self._labels[node]
        if node.op == "get_attr":
            return f"parameter {node.target}"
        path = ".".join(part for part in (self._owner, module_of(node)) if part)
        return f"{node.name} ({path or 'root'})"

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        region = self._program.regions[args[0]]
        owner = self.fetch_attr(target)
        parameters = [operator.attrgetter(name)(owner) for name in region.parameters]
        labels: list[str | None] = [None] * len(region.inputs)  # nodes that were looked at
        labels += [f"parameter {target}.{name}" for name in region.parameters]
        watch = _Watch(self._program, nn.Module(), region.graph, labels, target)
        return watch.run(*args[1:], *parameters)


@torch.no_grad()
def first_bad_node(
    program: Program,
    module: ProgramModule,
    graph: str,
    inputs: Mapping[str, Tensor],
    unseen: Collection[str] = (),
) -> str | None:
    """The first input, parameter or node of a graph whose value is not finite, or None.

    Args:
        program: the Program.
        module: the same Program, runnable.
        graph: the graph's name.
        inputs: by name.
        unseen: names of inputs that are not looked at.
    """
    order = [str(n.target) for n in program.graphs[graph].find_nodes(op="placeholder")]
    labels = [None if name in unseen else f"input {name}" for name in order]
    try:
        watch = _Watch(program, module, program.graphs[graph], labels)
        watch.run(*(inputs[name] for name in order))
    except _Found as found:
        return found.where
    return None


@torch.no_grad()
def first_bad_module(module: nn.Module, run: Callable[[], object]) -> str | None:
    """The first parameter that is not finite; else the first module to give such a value; or None.

    Args:
        module: what ``run`` runs.
        run: a forward pass.
    """
    for name, parameter in module.named_parameters():
        if not _finite(parameter):
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(_: nn.Module, __: object, result: object) -> None:
            if not _finite(result):
                found.append(name)

        return look

    hooks = [m.register_forward_hook(watch(name)) for name, m in module.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _finite(value: object) -> bool:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    floats = (t for t in tensors if t.is_floating_point())
    # torch has no isfinite for float8.
    return all(bool((t.float() if t.itemsize == 1 else t).isfinite().all()) for t in floats)
