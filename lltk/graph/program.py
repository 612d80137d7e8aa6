"""A Program: named graphs over one parameter set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx

from lltk.graph.contract import Contract, Role, TensorSpec, commit_graph
from lltk.graph.facts import ChannelsLastWeights
from lltk.graph.geometry import Geometry, Kind
from lltk.graph.packed import DECODE_SCALE, INPUT_SCALE, ROW_SCALES
from lltk.graph.spec import ModelSpec, Spec
from lltk.graph.stages import Stage

F = TypeVar("F")


class StateMap(Protocol):
    """How a pass that renames, splits or adds weights changes a state dict, both ways.

    Entries that the pass does not concern stay as they are. A state dict may hold only some of the
    weights.
    """

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict after the pass, from the one before it."""

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict before the pass, from the one after it."""


@dataclass(frozen=True)
class Region:
    """A graph that blocks share.

    Attributes:
        graph: its placeholders are ``inputs``, then ``parameters``; its output is a tuple.
        inputs: activation names, in call order.
        parameters: names relative to the owning module, in call order.
        callers: the named graphs that call it.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    callers: frozenset[str] = frozenset()

    @property
    def once_a_prompt(self) -> bool:
        """Whether only the prologue runs it."""
        return self.callers == {"prologue"}


@dataclass(frozen=True)
class LogEntry:
    """What one pass did.

    Attributes:
        name, version, config: the pass as it ran.
        stage: the Program's stage after it.
        numerics: how it may change results, a value of `Numerics`.
        matches: how much it rewrote, by kind.
        kept: what its configuration made it leave, by reason.
        ops_before, ops_after: calls over all graphs and regions.
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
        model: names and sizes of the captured model; `spec` is the same where it is a transformer.
        geometry: chunk, window, sink, resolution.
        dtype: compute dtype; `run_dtype` says what each parameter is cast to for running.
        graphs: by name. Inputs are placeholders, the output is a dict of named values, parameters
            and constants are ``get_attr`` nodes under diffusers' names.
        weights: parameters under diffusers' names: real ones in the dtypes of their file, or meta
            tensors.
        constants: tensors that follow from the configuration and are not saved.
        regions: graphs that blocks share, from the regional stage on.
        implementations: what runs each op, by the op's name, once the Program is lowered.
        recipe: the resolved recipe it was made from, as plain data.
        stage: how far it is.
        log: what each pass did, in order.
        facts: what passes left behind, by class; see `fact`.
        state_maps: how the passes changed state dicts, in order.
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
    recipe: dict[str, Any] = field(default_factory=dict)
    stage: Stage = Stage.CAPTURED
    log: list[LogEntry] = field(default_factory=list)
    facts: dict[type, object] = field(default_factory=dict)
    state_maps: list[StateMap] = field(default_factory=list)

    @property
    def spec(self) -> ModelSpec:
        """The transformer's names and sizes; decode and encode programs hold another model."""
        assert isinstance(self.model, ModelSpec), f"a {self.kind} program holds no transformer"
        return self.model

    def fact(self, kind: type[F]) -> F:
        """What a pass left of a class of `lltk.graph.facts`; the class's defaults if none did."""
        found = self.facts.get(kind)
        return found if isinstance(found, kind) else kind()

    def leave(self, fact: object) -> None:
        """Leave a fact for what comes later; it replaces the one of its class."""
        self.facts[type(fact)] = fact

    def change_weights(self, state_map: StateMap) -> None:
        """Change the weights by a map, which state dicts follow from now on."""
        self.weights = state_map.map_state(self.weights)
        self.state_maps.append(state_map)

    def run_dtype(self, name: str) -> torch.dtype:
        """The dtype that a parameter is cast to for running; ``weights`` keeps its own."""
        stored = self.weights[name].dtype
        packed = stored.itemsize == 1 or name.endswith((DECODE_SCALE, INPUT_SCALE, ROW_SCALES))
        if packed or not stored.is_floating_point:
            return stored
        parts = name.split(".")
        return torch.float32 if any(kept in parts for kept in self.model.keep_fp32) else self.dtype

    def memory_format(self, name: str) -> torch.memory_format:
        """How a parameter lies in memory when it runs, for ``Tensor.to``."""
        if name not in self.fact(ChannelsLastWeights).names:
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
        inputs = {
            n.name: TensorSpec.of(n.meta["val"], n.meta.get("role"))
            for n in nodes
            if n.op == "placeholder"
        }
        (output,) = (n for n in nodes if n.op == "output")
        return Contract(
            inputs, {k: TensorSpec.of(v.meta["val"]) for k, v in output.args[0].items()}
        )

    @property
    def pages(self) -> dict[str, TensorSpec]:
        """A stream's cache: the step's inputs that are parts of it, with axes [B, P, …]."""
        return self.contract("step").pages if "step" in self.graphs else {}

    @property
    def commit_graph(self) -> str:
        """Which of a stream's graphs makes a commit."""
        return commit_graph({name: self.contract(name) for name in self.graphs})

    @property
    def turns_pages(self) -> bool:
        """Whether a stream's pages hold keys before RoPE, which are turned when they are read."""
        return "step" in self.graphs and bool(self.contract("step").having(Role.PAGE_POSITIONS))

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This Program's state dict, from one of the captured model."""
        mapped = dict(state)
        for state_map in self.state_maps:
            mapped = state_map.map_state(mapped)
        return mapped

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The captured model's state dict, from one of this Program."""
        mapped = dict(state)
        for state_map in reversed(self.state_maps):
            mapped = state_map.unmap_state(mapped)
        return mapped
