"""The norm and the rotation of queries and keys, as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lltk.graph.edit import building, calls, module_of, prune, replace, shape
from lltk.graph.match import is_call
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.rotary import find_rotation
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

aten = torch.ops.aten
NORM_ROPE = overload("rms_norm_rope")


class Config(PassConfig):
    """Nothing to configure."""


class FuseNormRope(Pass[Config]):
    """Do the RMS norm over all heads and the rotation by positions in one op.

    ::

        rotate(heads(rms_norm(x, weight)), cos, sin)  →  rms_norm_rope(x, weight, cos, sin)
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    kinds = ("stream", "score", "reference")
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in calls(graph, aten.stack.default):
                found = find_rotation(node)
                norm = None if found is None else _norm(found.heads)
                if found is None or norm is None:
                    report.miss(node, "does not rotate a norm's result by a table of tokens")
                    continue
                x, _, weight, eps = norm.args
                with building(found.turned, module_of(norm)) as build:
                    made = build(NORM_ROPE, x, weight, found.cos, found.sin, eps)
                replace(found.turned, made)
                report.match("norms and rotations")
            prune(graph)


def _norm(heads: fx.Node) -> fx.Node | None:
    """The norm over all heads, with a weight, that gives these; or None."""
    if not is_call(heads, aten.unflatten.int) or heads.args[1] != 2:
        return None
    norm: Any = heads.args[0]
    if not is_call(norm, aten.rms_norm.default) or norm.args[1:2] != ([shape(norm)[-1]],):
        return None
    return norm if len(norm.args) == 4 and norm.args[2] is not None else None
