"""The stream's prologue: what depends on the text alone is computed once a prompt."""

from __future__ import annotations

from torch import fx

from lltk.graph.attention import find_attention
from lltk.graph.contract import Role
from lltk.graph.edit import (
    add_input,
    copy_graph,
    drop_unused_inputs,
    input_of,
    output,
    prune,
)
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage


class Config(PassConfig):
    """Nothing to configure."""


class HoistText(Pass[Config]):
    """Split the forward into a prologue, from text to K/V of cross-attention, and a step.

    ::

        forward(latents, times, text)
            →  prologue(text) → {cross_k_0, cross_v_0, …}
               step(latents, times, cross_k_0, cross_v_0, …)

    ``cross_k_i`` and ``cross_v_i`` of layer i are [B, S, H, D]; keys are already normed.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    kinds = ("stream",)
    numerics = Numerics.BITWISE

    def apply(self, program: Program, report: Report) -> None:
        (step,) = program.graphs.values()
        spec = program.spec
        prologue = copy_graph(step)
        result: dict[str, fx.Node] = {}
        for attention in find_attention(program, prologue, spec.cross_attention, Report()):
            result[f"cross_k_{attention.layer}"] = attention.k
            result[f"cross_v_{attention.layer}"] = attention.v
        output(prologue).args = (result,)
        prune(prologue)
        drop_unused_inputs(prologue)
        for attention in list(find_attention(program, step, spec.cross_attention, report)):
            for name, value in (("cross_k", attention.k), ("cross_v", attention.v)):
                given = add_input(step, f"{name}_{attention.layer}", value.meta["val"], Role.PROMPT)
                value.replace_all_uses_with(given)
            report.match("cross-attention")
        if not report.matches:
            return
        prune(step)
        if input_of(step, Role.TEXT).users:
            raise ValueError("the step still reads the text outside cross-attention")
        drop_unused_inputs(step)
        program.graphs = {"prologue": prologue, "step": step}
