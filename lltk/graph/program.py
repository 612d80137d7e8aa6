"""A Program: named graphs over one parameter set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from lltk.graph.geometry import Geometry, Kind
from lltk.graph.spec import ModelSpec, Spec
from lltk.graph.stages import Stage


class StateMap(Protocol):
    """Maps state dicts over one pass, both ways."""

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From before the pass to after it."""

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From after the pass to before it."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one input or output."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, value: Tensor) -> TensorSpec:
        return cls(tuple(int(size) for size in value.shape), value.dtype)


def is_page(name: str) -> bool:
    """Whether a stream's input of this name is an arena of pages."""
    return name.startswith(("k_pages_", "v_pages_"))


@dataclass(frozen=True)
class Contract:
    """Inputs and outputs of a graph by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


@dataclass(frozen=True)
class Region:
    """One block graph shared by layers.

    Attributes:
        graph: placeholders for ``inputs`` then ``parameters``; returns a tuple.
        inputs: activation names, in call order.
        parameters: names relative to the owning module, in call order.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class LogEntry:
    """What one pass did.

    Attributes:
        name, version, config: the pass as it ran.
        stage: the stage it left.
        numerics: what it may do to results (`Numerics`).
        matches: what it rewrote, counted by kind.
        kept: what it was told to leave, by reason.
        ops_before, ops_after: nodes over all graphs and regions.
        seconds: wall time.
    """

    name: str
    version: int
    config: dict[str, Any]
    stage: Stage
    numerics: str
    matches: dict[str, int]
    kept: dict[str, list[str]]
    ops_before: int
    ops_after: int
    seconds: float

    def plain(self) -> dict[str, Any]:
        """As data that JSON can hold."""
        return {**asdict(self), "stage": str(self.stage)}


@dataclass
class Program:
    """A set of named graphs over one parameter set.

    Attributes:
        kind: what it is for.
        model: its names and sizes; `spec` where it is a transformer.
        geometry: chunk, window, sink, resolution.
        dtype: compute dtype; `run_dtype` says what each parameter is cast to for running.
        graphs: by name; inputs are placeholders, the output is a dict of named values, parameters
            and constants are ``get_attr`` nodes under diffusers' names.
        weights: parameters under diffusers' names, real (in their file's dtypes) or meta.
        constants: tensors that follow from the configuration and are not saved.
        regions: block graphs shared by layers, from the regional stage on.
        implementations: what runs each op, by name, once lowered.
        trainable: parameters that train, or None for all.
        channels_last: weights of convolutions that lie in memory with channels last when they run.
        high_steps: denoising passes of a chunk, from 0, that the graph ``step_high`` makes.
        ranks: processes that run it together.
        recipe: the resolved recipe it was made from, as plain data.
        stage, log, passes: how far it is and what brought it there.
    """

    kind: Kind
    model: Spec
    geometry: Geometry
    dtype: torch.dtype
    graphs: dict[str, fx.Graph]
    weights: dict[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    implementations: dict[str, str] = field(default_factory=dict)
    trainable: frozenset[str] | None = None
    channels_last: frozenset[str] = frozenset()
    high_steps: frozenset[int] = frozenset()
    ranks: int = 1
    recipe: dict[str, Any] = field(default_factory=dict)
    stage: Stage = Stage.CAPTURED
    log: list[LogEntry] = field(default_factory=list)
    passes: list[StateMap] = field(default_factory=list)

    @property
    def spec(self) -> ModelSpec:
        """The transformer's names and sizes; only decode programs hold another model."""
        assert isinstance(self.model, ModelSpec), f"a {self.kind} program holds no transformer"
        return self.model

    def run_dtype(self, name: str) -> torch.dtype:
        """Dtype parameter ``name`` is cast to for running (its stored dtype is left alone)."""
        stored = self.weights[name].dtype
        if not stored.is_floating_point or stored.itemsize == 1:
            return stored
        parts = name.split(".")
        return torch.float32 if any(kept in parts for kept in self.model.keep_fp32) else self.dtype

    def memory_format(self, name: str) -> torch.memory_format:
        """How parameter ``name`` lies in memory when it runs, for ``Tensor.to``."""
        if name not in self.channels_last:
            return torch.preserve_format
        images = self.weights[name].dim() == 4
        return torch.channels_last if images else torch.channels_last_3d

    def every_graph(self) -> Iterator[tuple[str, fx.Graph]]:
        """Named graphs, then regions."""
        yield from self.graphs.items()
        for name, region in self.regions.items():
            yield name, region.graph

    def count_ops(self) -> int:
        """Calls over all graphs and regions."""
        return sum(
            node.op.startswith("call") for _, graph in self.every_graph() for node in graph.nodes
        )

    def contract(self, graph: str) -> Contract:
        """Inputs and outputs of a named graph."""
        nodes = self.graphs[graph].nodes
        inputs = {n.name: TensorSpec.of(n.meta["val"]) for n in nodes if n.op == "placeholder"}
        (output,) = (n for n in nodes if n.op == "output")
        return Contract(
            inputs, {k: TensorSpec.of(v.meta["val"]) for k, v in output.args[0].items()}
        )

    @property
    def pages(self) -> dict[str, TensorSpec]:
        """A stream's cache: the commit's inputs that are pages, with axes [B, P, …]."""
        if "commit" not in self.graphs:
            return {}
        inputs = self.contract("commit").inputs
        return {name: spec for name, spec in inputs.items() if is_page(name)}

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The captured model's state dict → this Program's."""
        mapped = dict(state)
        for step in self.passes:
            mapped = step.map_state(mapped)
        return mapped

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This Program's state dict → the captured model's."""
        mapped = dict(state)
        for step in reversed(self.passes):
            mapped = step.unmap_state(mapped)
        return mapped
