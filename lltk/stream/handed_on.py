"""Running an encoder's graph whose caches come from another rank, and go to another, one by one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx

from lltk.graph.contract import TensorSpec
from lltk.graph.edit import output, results_of
from lltk.graph.spec import EncoderSpec

if TYPE_CHECKING:
    from lltk.graph.module import ProgramModule


class HandedOn(Protocol):
    """Where a part's caches come from and go to."""

    @property
    def begins(self) -> bool:
        """Whether the video begins with this part. Then it has no caches before it."""

    def before(self, index: int, spec: TensorSpec, device: torch.device) -> Tensor:
        """The cache of this number that the part reads."""

    def after(self, index: int, cache: Tensor) -> None:
        """Take the cache of this number that the part leaves."""


class HandingOn(fx.Interpreter):
    """Runs a graph of an encode Program.

    It asks for a cache when a node first reads it, and gives one away as soon as it is made and
    that of the same number has arrived. So ranks that encode consecutive parts of a video run side
    by side, and wait for one another at each convolution only.

    Args:
        module: the Program, runnable.
        graph: one of its graphs, as `promptly` gives it.
        given: its inputs by name: its frames, and in the video's first part the caches too.
        specs: of all its inputs.
        handed: where caches come from that are not given, and where all go to.
    """

    def __init__(
        self,
        module: ProgramModule,
        graph: fx.Graph,
        given: Mapping[str, Tensor],
        specs: Mapping[str, TensorSpec],
        handed: HandedOn,
    ) -> None:
        super().__init__(module, graph=graph)
        spec = module.program.model
        assert isinstance(spec, EncoderSpec)
        self._given, self._specs, self._handed = given, specs, handed
        self._device = next(module.parameters()).device
        self.extra_traceback = False
        read = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
        self._awaited = {
            read[name]: index
            for index, name in enumerate(spec.cache_inputs)
            if name in read and name not in given
        }
        results = results_of(graph)
        names = zip(spec.cache_inputs, spec.cache_outputs, strict=True)
        self._leaves = {
            results[left]: (index, read.get(known)) for index, (known, left) in enumerate(names)
        }

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._given.get(target)

    def run_node(self, n: fx.Node) -> Any:
        for source in n.all_input_nodes:
            self._arrive(source)
        made = super().run_node(n)
        if n in self._leaves:
            index, before = self._leaves[n]
            self._arrive(before)
            self._handed.after(index, made)
        return made

    def _arrive(self, node: fx.Node | None) -> None:
        """Have the cache of a placeholder, if it has not arrived before."""
        if node is not None and node in self._awaited:
            index, spec = self._awaited.pop(node), self._specs[str(node.target)]
            self.env[node] = self._handed.before(index, spec, self._device)


def promptly(graph: fx.Graph, names: Collection[str]) -> fx.Graph:
    """A copy of a graph that makes some of its results as early as it can.

    Args:
        graph: gives a dict.
        names: of the results.
    """
    made = copy.deepcopy(graph)
    end = output(made)
    others = {node for name, node in results_of(made).items() if name not in names}
    tails: set[fx.Node] = set()
    for node in reversed(made.nodes):
        if node.op == "call_function" and node not in others and node.users.keys() <= {
            end, *tails,
        }:  # fmt: skip
            tails.add(node)
    place = {node: index for index, node in enumerate(made.nodes)}
    for node in [node for node in made.nodes if node in tails]:
        last = max(node.all_input_nodes, key=place.__getitem__)
        if last.op != "placeholder":
            last.append(node)
            place[node] = place[last]
    made.lint()
    return made
