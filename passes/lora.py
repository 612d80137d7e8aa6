"""Low-rank adapters beside chosen linears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, fx

from lltk.graph.edit import building, calls, module_of
from lltk.graph.facts import Trainable
from lltk.graph.linears import EVERY_LINEAR, Pattern, is_included, linear_module
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage

aten = torch.ops.aten


class Config(PassConfig):
    """Rank, scale and place of the adapters."""

    rank: int = Field(128, ge=1, description="rank of every adapter")
    alpha: float = Field(128.0, gt=0, description="an adapter's output is scaled by alpha / rank")
    include: Pattern | None = Field(
        None, description=f"modules that get one (whole-path regex); null for {EVERY_LINEAR}"
    )
    seed: int = Field(0, description="seed of the initial values of A (B starts at 0)")


@dataclass(frozen=True)
class Adapters:
    """The adapters of a Program: a fact, and the state map that adds them.

    Attributes:
        modules: that have an adapter, sorted; none where there are no adapters.
        rank: of every adapter.
        alpha: an adapter's output is scaled by alpha / rank.
        seed: of the initial values of A.
    """

    modules: tuple[str, ...] = ()
    rank: int = 1
    alpha: float = 1.0
    seed: int = 0

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / self.rank

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the base, and add initialised adapters where there are none."""
        mapped = dict(state)
        generator = torch.Generator().manual_seed(self.seed)
        for module in self.modules:
            a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            if a not in state and f"{module}.weight" in state:
                weight = state[f"{module}.weight"]
                mapped[a] = _initial_a(weight, self.rank, generator)
                mapped[b] = weight.new_zeros((weight.shape[0], self.rank))
        return mapped

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop the adapters, and what they learned; merge_lora keeps that."""
        return {name: tensor for name, tensor in state.items() if not is_adapter(name)}


class Lora(Pass[Config]):
    """Add a trainable low-rank adapter to linears, and freeze everything else.

    ::

        linear(x, W, b)  →  linear(x, W, b) + linear(linear(x, A), B) * (alpha / rank)

    A is ``<module>.lora_A.weight`` [rank, in] and B is ``<module>.lora_B.weight`` [out, rank], as
    in PEFT. A starts as PEFT's does (Kaiming uniform, a = √5). B starts at 0, so that the adapter
    changes nothing at first.
    """

    Config = Config
    reads = (Stage.CANONICAL, Stage.CAUSAL)
    numerics = Numerics.BITWISE

    def requires(self, program: Program) -> None:
        if any(entry.name == "merge_qkv" for entry in program.log):
            raise ValueError(
                "queries, keys and values share one linear already; put lora, and merge_lora, "
                "before merge_qkv in the recipe"
            )

    def apply(self, program: Program, report: Report) -> None:
        adapted: dict[str, Tensor] = {}
        for graph in program.graphs.values():
            for node in calls(graph, aten.linear.default):
                module = linear_module(node)
                if not is_included(program.spec, module, self.config.include):
                    report.miss(node, f"{module} does not match include={self.config.include!r}")
                    continue
                adapted[module] = program.weights[f"{module}.weight"]
                self._adapt(node, module, report)
        self._check_given(program.weights, adapted)
        config = self.config
        adapters = Adapters(tuple(sorted(adapted)), config.rank, config.alpha, config.seed)
        program.leave(adapters)
        program.change_weights(adapters)
        program.leave(Trainable(frozenset(filter(is_adapter, program.weights))))

    def _check_given(self, weights: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> None:
        """Check that adapters that come with the weights are those of this configuration."""
        given = {name: tuple(t.shape) for name, t in weights.items() if is_adapter(name)}
        wanted = {}
        for module, weight in adapted.items():
            wanted[f"{module}.lora_A.weight"] = (self.config.rank, weight.shape[1])
            wanted[f"{module}.lora_B.weight"] = (weight.shape[0], self.config.rank)
        differing = sorted(n for n in given | wanted if given.get(n) != wanted.get(n))
        if given and differing:
            first = differing[0]
            raise ValueError(
                f"{len(differing)} of the given adapters do not fit rank={self.config.rank} "
                f"and include: {first} is {given.get(first, 'absent')}, wanted "
                f"{wanted.get(first, 'absent')}; set lora.rank and lora.include to the file's"
            )

    def _adapt(self, node: fx.Node, module: str, report: Report) -> None:
        following = node.next
        with building(following, module_of(node)) as build:
            down = build(
                aten.linear.default, node.args[0], build.attribute(f"{module}.lora_A.weight")
            )
            up = build(aten.linear.default, down, build.attribute(f"{module}.lora_B.weight"))
            scaled = build(aten.mul.Tensor, up, self.config.alpha / self.config.rank)
            total = build(aten.add.Tensor, node, scaled)
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        report.match("linears")


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a low-rank adapter."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _initial_a(weight: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    value = weight.new_empty((rank, weight.shape[1]))
    if weight.is_meta:
        return value
    bound = 1 / math.sqrt(weight.shape[1])
    return value.uniform_(-bound, bound, generator=generator)
