"""Contracts as files hold them."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, NonNegativeInt, field_validator

from lltk.graph.contract import Contract, Role, TensorSpec
from lltk.graph.text import dtype_name, dtype_named


class TensorFacts(BaseModel):
    """An input or output of a graph."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[NonNegativeInt, ...]
    dtype: str
    role: Role | None = None

    @field_validator("dtype")
    @classmethod
    def _is_known(cls, short: str) -> str:
        dtype_named(short)
        return short

    @property
    def spec(self) -> TensorSpec:
        """The same as code has it."""
        return TensorSpec(self.shape, dtype_named(self.dtype), self.role)


class GraphFacts(BaseModel):
    """A graph's contract in a form that JSON holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: dict[str, TensorFacts]
    outputs: dict[str, TensorFacts]

    @property
    def contract(self) -> Contract:
        """The graph's contract."""
        return Contract(*({n: t.spec for n, t in s.items()} for s in (self.inputs, self.outputs)))

    @classmethod
    def of(cls, contract: Contract) -> GraphFacts:
        """A contract's."""
        return cls(inputs=_facts(contract.inputs), outputs=_facts(contract.outputs))


def _facts(specs: Mapping[str, TensorSpec]) -> dict[str, TensorFacts]:
    return {
        name: TensorFacts(shape=spec.shape, dtype=dtype_name(spec.dtype), role=spec.role)
        for name, spec in specs.items()
    }
