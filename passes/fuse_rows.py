"""Quantisers and gated residuals as one op with the steps before them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import fx

from lltk.graph.edit import building, calls, module_of, prune, replace, shape, sort_topologically
from lltk.graph.match import (
    ancestors,
    before_cast,
    is_call,
    is_of_rows,
    operands,
    read_once,
    sole_reader,
)
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_quantise.reference import BLOCK

aten = torch.ops.aten
NVFP4_QUANTISE = overload("nvfp4_quantise")
ROW_PIPELINE = overload("row_pipeline")
_ENDS_OF_NORMS = (
    aten.to.dtype,
    aten.flatten.using_ints,
    aten.layer_norm.default,
    aten.rms_norm.default,
)

StepName = Literal["residual", "norm", "activation"]


class Config(PassConfig):
    """Which steps are fused."""

    steps: tuple[StepName, ...] = Field(
        ("residual", "norm", "activation"), description="which steps an op may take in"
    )


class FuseRows(Pass[Config]):
    """Compute a residual, a norm, an activation and what quantises the result in one op.

    ::

        s = x + gate · y; row_pipeline(layer_norm(s) · scale + shift, to='fp8')
            →  values, scales, s = row_pipeline(x, y=y, gate=gate, scale=scale, shift=shift,
                                                eps=1e-06, to='fp8', keep_sum=True)
        nvfp4_quantise(gelu(x), 1, 'mse')
            →  row_pipeline(x, activation='gelu', to='nvfp4', rule='mse')
        layer_norm(x) · scale + shift
            →  row_pipeline(x, scale=scale, shift=shift, eps=1e-06)
        rms_norm(x, weight)
            →  row_pipeline(x, scale=weight, eps=1e-06)
        x + gate · y
            →  row_pipeline(x, y=y, gate=gate)

    From each quantiser the pass goes backwards: activation, norm, residual. Each of the three may
    be absent. An activation or a norm is taken in if nothing else reads its result. A residual's
    sum is taken in if the norm's scale and shift are not computed from it. What else reads the sum
    then reads it from the op. A norm that no quantiser takes in becomes an op too, with the
    residual before it. So does a gated sum that neither takes in.

    An op that reads nothing of its block stands before it, outside of all blocks. So the norm that
    a block begins with takes in the sum that the block before ends with, and blocks stay equal. For
    that its scale and shift must be made before the blocks, as `hoist_modulation` does; otherwise
    each is an op of its own block.

    Scale and shift are the norm's weight and bias, or like the gate those of the frame that a token
    belongs to. The pass runs after `fuse_norm_rope` and `fp8_infer` or `nvfp4_infer`, if these are
    in the recipe.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED)
    kinds = ("stream", "score", "reference")
    numerics = Numerics.ROUNDING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            for node in [*calls(graph, NVFP4_QUANTISE), *calls(graph, ROW_PIPELINE)]:
                form, steps = _form(node), self._steps_before(program, node)
                if form is None or not steps:
                    report.miss(node, "quantises no activation, norm or sum that it may take in")
                    continue
                _fuse(program, node, steps, form)
                report.match(f"{_label(steps)} → {form['to']}")
            sort_topologically(graph)
            prune(graph)
            for node in reversed(graph.nodes):
                step = self._find("norm", node) if node.target in _ENDS_OF_NORMS else None
                if step is not None:
                    steps = self._with_residual(program, node, [step])
                    _fuse(program, node, steps, {})
                    report.match(_label(steps))
            sort_topologically(graph)
            prune(graph)
            for node in calls(graph, aten.add.Tensor):
                step = self._find("residual", sole_reader(node, aten.to.dtype) or node)
                if step is None or "gate" not in step.arguments:
                    report.miss(node, "adds no gated residual")
                    continue
                with building(step.node, module_of(step.node)) as build:
                    made = build(ROW_PIPELINE, step.x, **step.arguments)
                    replace(step.node, build(operator.getitem, made, 0))
                report.match(step.label)
            prune(graph)

    def _steps_before(self, program: Program, quantiser: fx.Node) -> list[_Step]:
        """The steps that a quantiser takes in, from the last to the first."""
        steps: list[_Step] = []
        value: Any = quantiser.args[0]
        for name in ("activation", "norm"):
            if (step := self._find(name, value)) is not None:
                steps.append(step)
                value = step.x
        return self._with_residual(program, quantiser, steps)

    def _with_residual(self, program: Program, last: fx.Node, steps: list[_Step]) -> list[_Step]:
        """The steps that end at a node, with the residual before them if it is taken in."""
        total = self._find("residual", steps[-1].x if steps else last.args[0])
        if total is None or any(step.needs(total.node) for step in steps):
            return steps
        own = _layer(program, total.node)
        taken = [*steps, total]
        if own == _layer(program, last):
            return taken
        read_again = any(_layer(program, reader) == own for reader in total.node.users)
        return taken if _stands_before(program, last, taken) and not read_again else steps

    def _find(self, name: StepName, value: Any) -> _Step | None:
        """The step that makes a value, if it is one that is fused."""
        return _FINDERS[name](value) if name in self.config.steps else None


@dataclass(frozen=True)
class _Step:
    """A step of a pipeline as it stands in a graph.

    Attributes:
        label: for the report.
        node: a call in its module; for a residual, the one that gives the sum.
        x: what the step works on.
        arguments: what the op needs for it.
    """

    label: str
    node: fx.Node
    x: fx.Node
    arguments: dict[str, Any]

    def needs(self, value: fx.Node) -> bool:
        """Whether an argument other than ``x`` is computed from a value."""
        given = [each for each in self.arguments.values() if isinstance(each, fx.Node)]
        return any(each is value or value in ancestors(each) for each in given)


def _form(quantiser: fx.Node) -> dict[str, Any] | None:
    """How a quantiser writes its result, as the op's arguments; None where the op cannot."""
    if quantiser.target == ROW_PIPELINE:
        return dict(quantiser.kwargs)
    given: tuple[Any, ...] = quantiser.args
    x, tile, rule, seed = (*given, *(1, "none", None)[len(given) - 1 :])[:4]
    if tile != 1 or seed is not None or shape(x)[-1] % BLOCK:
        return None
    return {"to": "nvfp4", "rule": rule}


def _label(steps: list[_Step]) -> str:
    return " → ".join(step.label for step in reversed(steps))


def _layer(program: Program, node: fx.Node) -> int | None:
    """The block that a node is of."""
    return program.spec.layer_of(module_of(node))


def _stands_before(program: Program, last: fx.Node, steps: list[_Step]) -> bool:
    """Whether an op reads nothing of its block, and all its rows are made before the blocks."""
    rows: list[fx.Node] = [steps[-1].x]
    for step in steps:
        for name, value in step.arguments.items():
            if name == "y":
                rows.append(value)
            elif isinstance(value, fx.Node) and not _is_before_blocks(program, value):
                return False
    return all(_layer(program, each) != _layer(program, last) for each in rows)


def _is_before_blocks(program: Program, value: fx.Node) -> bool:
    """Whether no block has a part in a value. A block's parameter is its part; a table is not."""
    made = [each for each in ancestors(value) if each.op == "call_function"]
    return all(_layer(program, each) is None for each in (value, *made))


def _fuse(program: Program, last: fx.Node, steps: list[_Step], form: dict[str, Any]) -> None:
    """Put the op in the place of a quantiser, or of a norm's result if there is no form.

    Steps are in the order of `_steps_before`.
    """
    arguments: dict[str, Any] = {}
    for step in reversed(steps):
        arguments |= step.arguments
    arguments |= form
    first = steps[-1]
    keeps = "y" in arguments and not _leads_only_to(first.node, last)
    if keeps:
        arguments["keep_sum"] = True
    module = "" if _stands_before(program, last, steps) else module_of(first.node)
    with building(last, module) as build:
        made = build(ROW_PIPELINE, first.x, **arguments)
        number = len(last.meta["val"]) if form else 1
        total = build(operator.getitem, made, number) if keeps else None
        result = made if form else build(operator.getitem, made, 0)
    replace(last, result)
    if form and not module:
        for part in result.users:
            part.meta["module"] = ""
    if total is not None:
        replace(first.node, total)


def _leads_only_to(value: fx.Node, reader: fx.Node) -> bool:
    """Whether only the reader reads a value, itself or through calls that nothing else reads."""
    while len(value.users) == 1:
        (value,) = value.users
        if value is reader:
            return True
    return False


def _gelu(value: Any) -> _Step | None:
    """GELU by tanh, read once."""
    if not read_once(value, aten.gelu.default) or value.kwargs.get("approximate") != "tanh":
        return None
    return _Step("gelu", value, value.args[0], {"activation": "gelu"})


def _norm(value: Any) -> _Step | None:
    """A norm with scale and shift, or an RMS norm, that is computed in float32.

    Everything in it is read once.
    """
    if read_once(value, aten.rms_norm.default):
        return _rms_norm(value)
    dtype = value.meta["val"].dtype
    if dtype != torch.float32:
        value = operands(value, aten.to.dtype)[0]
    norm: Any = value
    scale: Any = None
    shift: Any = None
    if modulated := read_once(value, aten.flatten.using_ints):
        product, shift = operands(value.args[0], aten.add.Tensor)
        norm, scale = operands(product, aten.mul.Tensor)
        norm = operands(norm, aten.unflatten.int)[0]
    if not read_once(norm, aten.layer_norm.default):
        return None
    x, size, weight, bias, eps = norm.args[:5]
    if not modulated:
        scale, shift = weight, bias
    elif weight is not None or bias is not None:
        return None
    if dtype != torch.float32:
        x = before_cast(x)
    fits = x.meta["val"].dtype == dtype and list(size) == [shape(x)[-1]]
    if not fits or not is_of_rows(scale, x) or not is_of_rows(shift, x):
        return None
    label = "modulated norm" if modulated else "norm"
    return _Step(label, norm, x, {"scale": scale, "shift": shift, "eps": eps})


def _rms_norm(norm: fx.Node) -> _Step | None:
    """An RMS norm of rows with a weight; torch computes it in float32 whatever the dtype."""
    given: tuple[Any, ...] = norm.args
    x, size, *rest = given
    whole = size == [shape(x)[-1]] and x.meta["val"].dtype == norm.meta["val"].dtype
    if not whole or len(rest) != 2 or None in rest:
        return None
    weight, eps = rest
    return _Step("RMS norm", norm, x, {"scale": weight, "eps": eps})


def _sum(total: Any) -> _Step | None:
    """x + gate · y, computed in float32, or x + y; the result may be read more than once."""
    add = before_cast(total)
    if not is_call(add, aten.add.Tensor) or add.kwargs:
        return None
    x, y = add.args
    frames, gate = operands(operands(y, aten.flatten.using_ints)[0], aten.mul.Tensor)
    gated = operands(frames, aten.unflatten.int)[0]
    if add is not total:
        if len(add.users) > 1 or add.meta["val"].dtype != torch.float32:
            return None
        x, y, gated = (before_cast(each) for each in (x, y, gated))
    if _is_like(x, total) and _is_like(gated, total) and is_of_rows(gate, x):
        return _Step("gated sum", total, x, {"y": gated, "gate": gate})
    if _is_like(x, total) and _is_like(y, total):
        return _Step("sum", total, x, {"y": y})
    return None


def _is_like(value: Any, total: fx.Node) -> bool:
    """Whether a value has a sum's shape and dtype."""
    if not isinstance(value, fx.Node) or shape(value) != shape(total):
        return False
    return bool(value.meta["val"].dtype == total.meta["val"].dtype)


_FINDERS: dict[StepName, Callable[[Any], _Step | None]] = {
    "residual": _sum,
    "norm": _norm,
    "activation": _gelu,
}
