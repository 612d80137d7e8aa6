"""Choose what runs each op."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from lltk.graph.edit import calls
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import find_implementation, ops_with_choices, overload


class Config(PassConfig):
    """An implementation by name for each op; `lltk doctor` lists them."""

    paged_attention: str = Field("sdpa", description="reference, sdpa or cudnn")
    block_causal_attention: str = Field("sdpa", description="reference, sdpa or flex")
    nvfp4_paged_attention: str = Field(
        "decode", description="reference, decode, decode_triton or triton (decodes as it attends)"
    )

    @field_validator("paged_attention", "block_causal_attention", "nvfp4_paged_attention")
    @classmethod
    def _is_known(cls, name: str, info: ValidationInfo) -> str:
        return find_implementation(str(info.field_name), name).name


class Lower(Pass[Config]):
    """Swap each op for the implementation that the recipe names.

    ::

        lltk.paged_attention(…)  →  lltk.ops.paged_attention.sdpa.sdpa(…)

    The choice is recorded with its count; nothing is chosen at run time.
    """

    Config = Config
    reads = (Stage.REGIONAL,)
    leaves = Stage.LOWERED
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        chosen = self.config.model_dump()
        for op in ops_with_choices():
            implementation = find_implementation(op, chosen[op])
            for _, graph in program.every_graph():
                for node in calls(graph, overload(op)):
                    if implementation.name != "reference":
                        node.target = implementation.load()
                        node.meta["op"] = overload(op)
                    report.match(f"{op} → {implementation.name}")
                    program.implementations[op] = implementation.name
