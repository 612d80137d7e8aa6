"""Choose what runs each op."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from lltk.graph.edit import calls
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.hadamard.op import OVERLOAD as HADAMARD
from lltk.ops.implementations import find_implementation, ops_with_choices, overload
from lltk.ops.nvfp4_backends import find_backend
from lltk.ops.nvfp4_dequantise.op import OVERLOAD as DEQUANTISE
from lltk.ops.nvfp4_linear.op import OVERLOAD as LINEAR
from lltk.ops.nvfp4_matmul.op import OVERLOAD as MATMUL
from lltk.ops.nvfp4_quantise.op import OVERLOAD as QUANTISE
from lltk.ops.nvfp4_quantise_norm.op import OVERLOAD as QUANTISE_NORM
from lltk.ops.nvfp4_quantise_transposed.op import OVERLOAD as QUANTISE_TRANSPOSED
from lltk.ops.nvfp4_transpose.op import OVERLOAD as TRANSPOSE
from lltk.ops.nvfp4_write_page.op import OVERLOAD as WRITE_PAGE

NVFP4_OPS = frozenset(
    {
        QUANTISE,
        QUANTISE_NORM,
        QUANTISE_TRANSPOSED,
        DEQUANTISE,
        TRANSPOSE,
        HADAMARD,
        MATMUL,
        LINEAR,
        WRITE_PAGE,
    }
)
"""Ops that take a backend, and pass it on to what they call."""
_ROWS = "reference, torch (operations that a compiler can fuse) or triton"


class Config(PassConfig):
    """An implementation by name for each op; `lltk doctor` lists them."""

    paged_attention: str = Field(
        "sdpa", description="reference, sdpa, cudnn or arena (copies no pages)"
    )
    block_causal_attention: str = Field("sdpa", description="reference, sdpa or flex")
    nvfp4_paged_attention: str = Field(
        "decode",
        description="reference, decode, decode_triton, triton (decodes as it attends) or "
        "fp8_decode (to E4M3, and attends in FP8)",
    )
    fp8_quantise: str = Field("reference", description=_ROWS)
    fp8_quantise_norm: str = Field("reference", description=_ROWS)
    fp8_quantise_add_norm: str = Field("reference", description=_ROWS)
    fp8_quantise_attention: str = Field(
        "reference", description="reference or fp8_decode, as nvfp4_paged_attention's"
    )
    fp8_quantise_gelu: str = Field("reference", description=_ROWS)
    gated_add: str = Field("reference", description=_ROWS)
    rms_norm_rope: str = Field("reference", description=_ROWS)
    fp8_matmul: str = Field("reference", description="reference or scaled_mm")
    cached_norm_silu: str = Field("reference", description="reference or triton")
    upsample_residual: str = Field("reference", description="reference or triton")
    fp8_cached_norm_silu: str = Field("reference", description="reference or triton")
    fp8_conv3d: str = Field("reference", description="reference or triton")
    nvfp4: str = Field("reference", description="backend of every NVFP4 op; lltk doctor lists them")

    @field_validator(*ops_with_choices())
    @classmethod
    def _is_known(cls, name: str, info: ValidationInfo) -> str:
        return find_implementation(str(info.field_name), name).name

    @field_validator("nvfp4")
    @classmethod
    def _is_a_backend(cls, name: str) -> str:
        return find_backend(name).name


class Lower(Pass[Config]):
    """Swap each op for the implementation that the recipe names.

    ::

        lltk.paged_attention(…)  →  lltk.ops.paged_attention.sdpa.sdpa(…)
        lltk.nvfp4_matmul(…)     →  lltk.nvfp4_matmul(…, backend='reference')

    The choice is recorded with its count; nothing is chosen at run time. A choice but
    the default for an op that no graph has is refused.
    """

    Config = Config
    reads = (Stage.CANONICAL, Stage.REGIONAL)
    leaves = Stage.LOWERED
    kinds = (*Pass.kinds, "decode")
    numerics = Numerics.ROUNDING

    def requires(self, program: Program) -> None:
        if program.stage is not Stage.REGIONAL and program.kind != "decode":
            raise ValueError(
                f"reads a regional program, this one is {program.stage}; move it behind "
                "regionalise in the recipe's passes"
            )

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
        for _, graph in program.every_graph():
            for node in graph.nodes:
                if node.target in NVFP4_OPS:
                    node.kwargs = {**node.kwargs, "backend": self.config.nvfp4}
                    report.match(f"NVFP4 → {self.config.nvfp4}")
                    program.implementations["nvfp4"] = self.config.nvfp4
        asked = {op for op, name in chosen.items() if name != Config.model_fields[op].default}
        if idle := sorted(asked - program.implementations.keys()):
            there = ", ".join(program.implementations)
            raise ValueError(
                f"{', '.join(idle)}: there is no such op to choose for; remove the key, or add the "
                f"pass that makes the op (there is {there or 'none yet'})"
            )
