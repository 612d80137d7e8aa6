"""The layers of an engine, and whether they are the fast ones.

A builder that finds no kernel for a product in FP4 decodes its operands and multiplies in bfloat16,
without a word. So its plan is read, and each product in FP4 or FP8 and each attention of the model
must be in a layer of its kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from lltk.stream.runtimes.tensorrt_plugin import NAME

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)")
_DTYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PRODUCTS = ("gemm", "runtime_fusion")
"""Kinds of layers that multiply matrices, with more around it or not."""
_PLUGIN = "custom_layer"
"""The kind of layers that plugins are."""
_FLOAT8E4M3FN, _FLOAT4E2M1 = 17, 23


class Fast(StrEnum):
    """A layer that a node is meant to become."""

    FP4 = "a product of FP4 operands"
    FP8 = "a product of FP8 operands"
    ATTENTION = "fused attention"


_OPERANDS = {Fast.FP4: "FP4E2M1", Fast.FP8: "FP8"}


class Layer(BaseModel):
    """A layer of an engine.

    Attributes:
        name: the builder's.
        kind: ``gemm``, ``kgen`` and so on.
        inputs: dtypes of what it reads, constants too.
        outputs: dtypes of what it makes.
        nodes: the model's nodes that it computes, or a part of.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def does(self) -> str:
        """What it does, in words."""
        for fast in Fast:
            if self.is_fast(fast):
                return str(fast)
        return "a product" if self.kind in _PRODUCTS else self.kind

    def is_fast(self, fast: Fast) -> bool:
        """Whether it is of a kind."""
        if fast is Fast.ATTENTION:
            return "mha" in self.name or (self.kind == _PLUGIN and NAME in self.name)
        return self.kind in _PRODUCTS and self.inputs.count(_OPERANDS[fast]) >= 2


def read_layers(lines: Iterable[str]) -> list[Layer]:
    """The layers in a builder's log; other lines are passed over."""
    return [
        Layer(
            name=found["name"],
            kind=found["kind"],
            inputs=tuple(_DTYPE.findall(before)),
            outputs=tuple(_DTYPE.findall(after)),
            nodes=tuple(_NODE.findall(after)),
        )
        for found in map(_LINE.match, lines)
        if found
        for before, _, after in [found["rest"].partition("Outputs: ")]
    ]


def meant(model: ModelProto) -> dict[str, Fast]:
    """What nodes of a model are meant to become, by their names."""
    makers = {name: node for node in model.graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found: dict[str, Fast] = {}
    for node in model.graph.node:
        if node.op_type in ("Attention", NAME):
            found[node.name] = Fast.ATTENTION
        if node.op_type == "MatMul" and (kind := _weight_type(node, makers, types)):
            found[node.name] = kind
    return found


def _weight_type(
    node: NodeProto, makers: Mapping[str, NodeProto], types: Mapping[str, int]
) -> Fast | None:
    """What a product is meant to be by the parameter that its second operand is decoded from."""
    name = node.input[1]
    while name in makers and makers[name].op_type in ("Cast", "Transpose", "DequantizeLinear"):
        name = makers[name].input[0]
    return {_FLOAT4E2M1: Fast.FP4, _FLOAT8E4M3FN: Fast.FP8}.get(types.get(name, 0))


def lint(
    wanted: Mapping[str, Fast], layers: Sequence[Layer], waived: Collection[str] = ()
) -> Iterator[str]:
    """What is not as it was meant to be, a line each.

    Args:
        wanted: see `meant`.
        layers: of the engine.
        waived: paths of modules whose nodes may be anything.
    """
    for node, fast in wanted.items():
        module = node.rpartition("/")[0]
        if module in waived:
            continue
        own = [layer for layer in layers if node in layer.nodes]
        if not any(layer.is_fast(fast) for layer in own):
            became = ", ".join(sorted({f"{each.does} ({each.name})" for each in own}))
            yield f"{module}: {node} is not {fast} but {became or 'in no layer'}"


def summary(layers: Sequence[Layer]) -> dict[str, int]:
    """How many layers do what, the fast ones first."""
    counted = {str(fast): 0 for fast in Fast}
    for layer in layers:
        counted[layer.does] = counted.get(layer.does, 0) + 1
    return {does: count for does, count in counted.items() if count}
