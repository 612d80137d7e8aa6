"""Linear layers of a graph, and which of them a pass converts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, ValidationInfo
from torch import fx

from lltk.graph.edit import calls, shape
from lltk.graph.passes import PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.spec import ModelSpec

aten = torch.ops.aten
Rule = Literal["none", "mse", "mae", "abs_max"]
"""What Four Over Six minimises; "none" is plain NVFP4."""
EVERY_LINEAR = "every linear of the blocks' attention and feed-forward"


def _check_pattern(pattern: str, info: ValidationInfo) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        option = info.field_name
        raise ValueError(f"{option}: {pattern!r} is not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
"""A regular expression, as the value of an option."""


class LinearChoice(PassConfig):
    """Which linears a quantising pass converts."""

    include: Pattern | None = Field(
        None, description=f"modules to convert (whole-path regex); null for {EVERY_LINEAR}"
    )
    exclude: tuple[Pattern, ...] = Field((), description="modules to keep among them (regexes)")
    keep_last: float = Field(
        0.0, ge=0, lt=1, description="fraction of the blocks to keep, counted from the last"
    )
    ragged: Literal["refuse", "pad"] = Field(
        "refuse", description="what to do where a width is not a multiple of 16"
    )


@dataclass(frozen=True)
class Linear:
    """A call of a linear.

    Attributes:
        node: the call.
        module: path of the module that has the weight.
        x, weight, bias: its operands.
    """

    node: fx.Node
    module: str
    weight: fx.Node
    bias: fx.Node | None

    @property
    def x(self) -> fx.Node:
        """What it reads now: where that was a linear too, it may have been replaced meanwhile."""
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        return x

    def kind(self, program: Program) -> str:
        """The module's path within its block; outside blocks its whole path."""
        layer = program.spec.layer_of(self.module)
        block = "" if layer is None else program.spec.block.format(layer=layer) + "."
        return self.module.removeprefix(block)


def linear_module(node: fx.Node) -> str:
    """Path of the module that has the weight of a linear."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target).removesuffix(".weight")


def chosen_linears(
    program: Program, graph: fx.Graph, choice: LinearChoice, report: Report, widths: int
) -> Iterator[Linear]:
    """The linears to convert, in order. The others are reported, each with the reason.

    Args:
        program, graph: where to look.
        choice: the pass's configuration.
        report: the pass's report.
        widths: both widths of a weight must be multiples of it.

    Raises:
        ValueError: a width is no such multiple, and ``ragged`` is ``refuse``; names the layer.
    """
    for node in list(calls(graph, aten.linear.default)):
        module = linear_module(node)
        reason = _kept(program, module, choice)
        if reason is not None:
            report.keep(node, module, reason)
            continue
        _, weight, *bias = node.args
        assert isinstance(weight, fx.Node)
        outer, inner = shape(weight)
        odd = [f"{what} {n}" for what, n in (("in", inner), ("out", outer)) if n % widths]
        if odd and choice.ragged == "refuse":
            raise ValueError(
                f"{module}: {' and '.join(odd)} features are not a multiple of {widths}; exclude "
                f"it with exclude=[{re.escape(module)!r}], or set ragged=pad"
            )
        given = bias[0] if bias else node.kwargs.get("bias")
        assert given is None or isinstance(given, fx.Node)
        yield Linear(node, module, weight, given)


def is_included(spec: ModelSpec, module: str, include: str | None) -> bool:
    """Whether a linear is among those that ``include`` names; None names `EVERY_LINEAR`."""
    if include is None:
        return spec.linear_role(module) is not None
    return re.fullmatch(include, module) is not None


def _kept(program: Program, module: str, choice: LinearChoice) -> str | None:
    """Why a linear stays as it is, or None."""
    if not is_included(program.spec, module, choice.include):
        return "not among include"
    for pattern in choice.exclude:
        if re.fullmatch(pattern, module):
            return f"excluded by {pattern!r}"
    layer, layers = program.spec.layer_of(module), program.spec.layers
    if layer is not None and layer >= layers - math.ceil(choice.keep_last * layers):
        return f"in the last {choice.keep_last:.0%} of the blocks"
    return None
