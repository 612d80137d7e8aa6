"""The runtime over graphs in ONNX or engines, and the decoder over such graphs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lltk.graph.contract import Contract, Role, commit_graph, page_output
from lltk.graph.geometry import Geometry
from lltk.graph.spec import DecoderSpec, ModelSpec
from lltk.graph.verify import STEP_HIGH
from lltk.ops.rope_table.reference import rope_table
from lltk.stream.decoder import GraphDecoder
from lltk.stream.lanes import Lane
from lltk.stream.runtimes.paged import PagedRuntime, check_indices, largest, zeros


class Graph(Protocol):
    """A graph that is loaded, as `lltk.stream.runtimes.onnx_graph.OnnxGraph`."""

    @property
    def contract(self) -> Contract:
        """Inputs and outputs."""

    def __call__(
        self, given: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The outputs of a call, some of them put where ``into`` says."""


class OrtRuntime(PagedRuntime):
    """Runs a stream's graphs that mutate nothing; see `lltk.stream.runtimes.Runtime`.

    A commit's outputs go straight into their page, which is contiguous as the batch is 1. On a GPU
    every call waits for the device.

    Args:
        graphs: ``prologue``, ``step`` and maybe ``step_high``, and ``commit`` unless one of them
            gives pages too; runtimes may share them.
        geometry: what they are made for.
        spec: the transformer's.
        lane: where the calls take turns.
        high_steps: which of a chunk's passes ``step_high`` makes.
    """

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        geometry: Geometry,
        spec: ModelSpec,
        lane: Lane,
        high_steps: Collection[int] = (),
    ) -> None:
        assert geometry.batch == 1, "a page of several videos is not contiguous"
        step, prologue = graphs["step"].contract, graphs["prologue"].contract
        super().__init__(geometry, spec, step.input(Role.LATENTS).dtype, lane, step.pages)
        self._graphs, self._high_steps = graphs, high_steps
        self._commit = commit_graph({name: each.contract for name, each in graphs.items()})
        self._clean = torch.zeros(step.input(Role.TIME).shape, device=lane.device)
        self._text = zeros(prologue.outputs, lane.device)
        self._rotary: tuple[tuple[float, ...], tuple[Tensor, Tensor]] | None = None

    def set_prompt(self, text: Tensor) -> None:
        graph = self._graphs["prologue"]
        text = text.to(graph.contract.input(Role.TEXT).dtype)
        graph(graph.contract.named({Role.TEXT: text}), self._text)

    def step(
        self,
        latents: Tensor,
        timestep: Tensor,
        positions: Tensor,
        table: Sequence[int],
        index: int = 0,
    ) -> Tensor:
        graph = self._graphs[STEP_HIGH if index in self._high_steps else "step"]
        common = {Role.LATENTS: latents, Role.TIME: timestep}
        return graph(self._given(graph, common, positions, table))[self._spec.output]

    def first_bad(
        self,
        latents: Tensor,
        timestep: Tensor,
        positions: Tensor,
        table: Sequence[int],
        index: int = 0,
    ) -> str | None:
        """As the protocol says. A graph's inside is not seen: it names outputs of graphs."""
        for name, value in self._text.items():
            if not _finite(value):
                return f"output {name} of prologue"
        made = self.step(latents, timestep, positions, table, index)
        return None if _finite(made) else f"output {self._spec.output} of step"

    def commit(self, latents: Tensor, positions: Tensor, table: Sequence[int], slot: int) -> None:
        check_indices((*table, slot), self._geometry.pages)
        graph = self._graphs[self._commit]
        common = {Role.LATENTS: latents, Role.TIME: self._clean}
        given = self._given(graph, common, positions, table)
        graph(given, {page_output(name): page[:, slot] for name, page in self._pages.items()})

    def first_bad_commit(
        self,
        latents: Tensor,
        positions: Tensor,
        table: Sequence[int],
        slot: int,
        magnitudes: Tensor,
    ) -> str:
        """As the protocol says; it names the output of the graph, and makes nothing again."""
        first = int(magnitudes.isfinite().logical_not().nonzero()[0])
        return f"output {page_output(list(self._telling)[first])} of {self._commit}"

    def _given(
        self,
        graph: Graph,
        common: Mapping[Role, Tensor],
        positions: Tensor,
        table: Sequence[int],
    ) -> dict[str, Tensor]:
        """All inputs of a graph by name: prompt and cache too."""
        check_indices(table, self._geometry.pages)
        listed = torch.zeros(self._geometry.pages, dtype=torch.bool)
        listed[list(table)] = True
        cos, sin = self._tables(positions)
        moving = {Role.LISTED: listed.to(self.device), Role.ROTARY_COS: cos, Role.ROTARY_SIN: sin}
        return {**self._text, **self._pages, **graph.contract.named({**common, **moving})}

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary tables of positions, made on the host; a chunk's passes share them."""
        key = tuple(positions.tolist())
        if self._rotary is None or self._rotary[0] != key:
            spec = self._spec
            sides, split = self._geometry.grid(spec), spec.rope_split
            cos, sin = rope_table(positions.cpu(), *sides, split, spec.rope_theta)
            self._rotary = key, (cos.to(self.device), sin.to(self.device))
        return self._rotary[1]


class OrtDecoder(GraphDecoder):
    """Runs a decoder's graphs; see `lltk.stream.decoder.LatentDecoder`.

    Args:
        graphs: ``first``, ``step`` and maybe ``steps``; decoders may share them.
        spec: the decoder's.
        lane: where the calls take turns.
    """

    def __init__(self, graphs: Mapping[str, Graph], spec: DecoderSpec, lane: Lane) -> None:
        super().__init__(spec, {name: each.contract for name, each in graphs.items()}, lane)
        self._graphs = graphs

    def _run(self, graph: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._graphs[graph](given)


def _finite(value: Tensor) -> bool:
    return bool(largest(value).isfinite())
