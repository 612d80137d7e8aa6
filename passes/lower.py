"""Choose what runs each op."""

from __future__ import annotations

from typing import Any

from pydantic import Field, create_model, model_validator

from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.spec import ModelSpec
from lltk.graph.stages import Stage
from lltk.ops.implementations import (
    Implementation,
    every_implementation,
    find_implementation,
    implementations,
    op_called,
    ops,
    ops_with_choices,
    preferred,
)

_IN_ROW_PIPELINE = (
    "fp8_quantise",
    "fp8_quantise_norm",
    "fp8_quantise_add_norm",
    "fp8_quantise_gelu",
    "gated_add",
)
"""Ops of older recipes that `row_pipeline` does the work of."""


class Choices(PassConfig):
    """An implementation by name for each op; `lltk doctor` lists them.

    A key for each op is added to these, from what its implementations declare. Its value is a name
    or the path of a module of the user's, as ``my_kernels.fast``.
    """

    prefer: tuple[str, ...] = Field(
        (),
        description="names of implementations: an op without a key of its own takes the first of "
        "them that it has, or else its default. At least one op must take each name",
    )

    @model_validator(mode="before")
    @classmethod
    def _has_no_old_key(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if old := given.get("nvfp4"):
            new = f"{old}, triton" if old in ("te", "scaled_mm") else old
            raise ValueError(f"nvfp4 is no key any more: write prefer: [{new}] in its place")
        for key in _IN_ROW_PIPELINE:
            if key in given:
                raise ValueError(f"{key} is no key any more: write row_pipeline in its place")
        return given

    @model_validator(mode="after")
    def _are_known(self) -> Choices:
        for op, name in self.named().items():
            find_implementation(op, name)
        known = {each.name for each in every_implementation()}
        if unknown := [name for name in self.prefer if name not in known]:
            raise ValueError(
                f"prefer: no op has an implementation {unknown[0]!r} (there is "
                f"{', '.join(sorted(known))})"
            )
        return self

    def named(self) -> dict[str, str]:
        """Implementations that are chosen by the key of an op."""
        keys = self.model_dump(exclude={"prefer"}, exclude_none=True)
        return {op: str(name) for op, name in keys.items()}

    def chosen(self, op: str) -> Implementation:
        """What runs an op."""
        name = self.named().get(op)
        return find_implementation(op, name) if name else preferred(op, self.prefer)


def _described(op: str) -> str:
    """An op's implementations in words."""
    found = implementations(op).values()
    return "; ".join(f"{each.name}: {each.declared.how}" for each in found)


def make_config() -> type[Choices]:
    """The pass's configuration, with a key for every op."""
    keys: dict[str, Any] = {
        op: (str | None, Field(None, description=_described(op))) for op in ops()
    }
    return create_model("Config", __base__=Choices, __module__=__name__, **keys)


class Lower(Pass[Choices]):
    """Swap each op for the implementation that the recipe names.

    ::

        lltk.paged_attention(…)  →  lltk.ops.paged_attention.sdpa.paged_attention(…)
        lltk.nvfp4_matmul(…)     →  lltk.nvfp4_matmul_triton(…)

    The choice is recorded with its count; nothing is chosen at run time. A name that
    no op of the program takes is refused.
    """

    Config = make_config()
    reads = (Stage.CANONICAL, Stage.REGIONAL)
    leaves = Stage.LOWERED
    kinds = (*Pass.kinds, "decode", "encode")
    numerics = Numerics.ROUNDING

    def requires(self, program: Program) -> None:
        if program.stage is not Stage.REGIONAL and isinstance(program.model, ModelSpec):
            raise ValueError(
                f"reads a regional program, this one is {program.stage}; move it behind "
                "regionalise in the recipe's passes"
            )

    def apply(self, program: Program, report: Report) -> None:
        named = self.config.named()
        choices = {*ops_with_choices(), *named}
        for _, graph in program.every_graph():
            for node in graph.nodes:
                op = op_called(node.target)
                if op not in choices:
                    continue
                implementation = self.config.chosen(op)
                if implementation.name != "reference":
                    node.meta["op"] = node.target
                    node.target = implementation.load()
                report.match(f"{op} → {implementation.name}")
                program.implementations[op] = implementation.name
        made = program.implementations
        there = ", ".join(made) or "none yet"
        if idle := sorted(named.keys() - made.keys()):
            raise ValueError(
                f"{', '.join(idle)}: there is no such op to choose for; remove the key, or add the "
                f"pass that makes the op (there is {there})"
            )
        if idle := [name for name in self.config.prefer if name not in made.values()]:
            raise ValueError(
                f"prefer: no op of this program takes {' or '.join(idle)}; remove the name, or add "
                f"a pass that makes an op that has it (there is {there})"
            )
