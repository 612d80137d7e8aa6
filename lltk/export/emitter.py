"""A Program's graphs as ONNX: a walk over their nodes, with a function for each op.

The functions are in the modules beside this one, a module a family of ops. An op that TensorRT
takes in another form has a second function, in the module ``tensorrt``. Blocks' regions are written
out for every layer. Parameters are not in the graphs: they name them in a `WeightPool`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib import import_module
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor, fx

from lltk.export.weights import WeightPool
from lltk.graph.contract import TensorSpec
from lltk.graph.edit import module_of, op_of, output, results_of
from lltk.graph.program import Program

OPSET = 23
IR_VERSION = 11
"""The oldest that has this opset; newer ones are refused by older runtimes."""
_FAMILIES = (
    "arithmetic", "attention", "images", "linears", "nvfp4", "rows", "shapes", "tensorrt",
)  # fmt: skip
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}

Value = Any
"""The name of a tensor in the graph, or a list of those; in arguments, also plain data."""
Rule = Callable[..., Value]


class Dialect(StrEnum):
    """For which runtime's parser a graph is written."""

    ORT = "ort"
    TENSORRT = "tensorrt"


_RULES: dict[tuple[object, Dialect | None], Rule] = {}


def emits(*ops: object, dialect: Dialect | None = None) -> Callable[[Rule], Rule]:
    """Register what emits some ops: a function of the emitter, the node and its arguments.

    Args:
        ops: of torch or lltk.
        dialect: for which alone; by default for all that have no function of their own.
    """

    def register(rule: Rule) -> Rule:
        for op in ops:
            assert (op, dialect) not in _RULES, f"{op} has a rule"
            _RULES[op, dialect] = rule
        return rule

    return register


class Emitter:
    """Emits one graph.

    Args:
        program: whose graph it is.
        weights: takes the parameters that the graph reads.
        dialect: of ONNX.
    """

    def __init__(
        self, program: Program, weights: WeightPool, dialect: Dialect = Dialect.ORT
    ) -> None:
        for family in _FAMILIES:
            import_module(f"{__package__}.{family}")
        self._program, self._weights = program, weights
        self.dialect = dialect
        """Of the graph."""
        self._nodes: list[NodeProto] = []
        self._constants: dict[tuple[Any, ...], TensorProto] = {}
        self._read: dict[str, TensorProto] = {}
        self._taken: Counter[str] = Counter()
        self.scope = ""
        """Path of the module whose node is emitted."""

    def emit(self, name: str) -> ModelProto:
        """The model of a named graph; its parameters are described, and lie in the pool's file.

        Raises:
            ValueError: an op has no form in ONNX here; names it with its node and module.
        """
        graph, contract = self._program.graphs[name], self._program.contract(name)
        dtype = self._program.dtype
        if self.dialect is Dialect.ORT and dtype != torch.float32:
            raise ValueError(
                f"{name}: computes in {dtype}, for which ONNX Runtime has no kernels on a CPU; set "
                "model.dtype=float32"
            )
        self._taken.update([*contract.inputs, *contract.outputs])
        inputs = graph.find_nodes(op="placeholder")
        made: dict[fx.Node, Value] = {node: str(node.target) for node in inputs}
        self._run(name, graph, made, "")
        for result, node in results_of(graph).items():
            self._nodes.append(helper.make_node("Identity", [made[node]], [result], name=result))
        found = helper.make_graph(
            self._nodes,
            name,
            [described(each, spec, self.dialect) for each, spec in contract.inputs.items()],
            [described(each, spec, self.dialect) for each, spec in contract.outputs.items()],
            [*self._read.values(), *self._constants.values()],
        )
        domains = {node.domain: 1 for node in self._nodes} | {"": OPSET}
        opset = [helper.make_opsetid(*each) for each in domains.items()]
        return helper.make_model(
            found, opset_imports=opset, ir_version=IR_VERSION, producer_name="lltk"
        )

    def _run(self, name: str, graph: fx.Graph, made: dict[fx.Node, Value], owner: str) -> None:
        """Emit nodes; ``made`` holds the placeholders' values and takes the others.

        Args:
            name: of the graph or region.
            graph: to emit.
            made: values by node.
            owner: path of the block whose region it is.
        """
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                made[node] = str(node.target)
            elif node.op == "call_module":
                made[node] = self._called(node, made)
            elif node.target is operator.getitem:
                values, index = _plain(node.args, made)
                made[node] = values[index]
            else:
                op = op_of(node)
                rule = _RULES.get((op, self.dialect)) or _RULES.get((op, None))
                path = ".".join(part for part in (owner, module_of(node)) if part) or "root"
                if rule is None:
                    raise ValueError(
                        f"{name}: {node.name} ({path}): {op} has no form in ONNX in this "
                        "version; remove the pass that made it from the recipe"
                    )
                self.scope = path
                args, kwargs = _plain(node.args, made), _plain(node.kwargs, made)
                made[node] = rule(self, node, *args, **kwargs)

    def _called(self, node: fx.Node, made: dict[fx.Node, Value]) -> list[Value]:
        """Emit a region with a block's parameters."""
        owner, name = str(node.target), str(node.args[0])
        region = self._program.regions[name]
        values = _plain(node.args[1:], made)
        values += [f"{owner}.{own}" for own in region.parameters]
        inputs = region.graph.find_nodes(op="placeholder")
        inside: dict[fx.Node, Value] = dict(zip(inputs, values, strict=True))
        self._run(name, region.graph, inside, owner)
        return [inside[result] for result in output(region.graph).all_input_nodes]

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one result; returns the result's name."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node with several results. An input that is left out is an empty name."""
        given = list(inputs)
        while not given[-1]:
            given.pop()  # ONNX Runtime's fusions crash on an empty input at the end
        for each in given:
            if each in self._program.weights or each in self._program.constants:
                self.parameter(each)
        name = self._fresh(f"{self.scope}/{kind}")
        results = [name] if count == 1 else [f"{name}:{index}" for index in range(count)]
        self._nodes.append(helper.make_node(kind, given, results, name=name, **attributes))
        return results

    def constant(self, value: Any, dtype: torch.dtype) -> str:
        """The name of a small constant; equal ones are one."""
        array = np.asarray(value, helper.tensor_dtype_to_np_dtype(TYPES[dtype]))
        key = (array.tobytes(), array.dtype.str, array.shape)
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, self._fresh("constant"))
        return self._constants[key].name

    def ints(self, *values: int) -> str:
        """The name of a list of integers."""
        return self.constant([int(value) for value in values], torch.int64)

    def parameter(self, name: str, transposed: bool = False, packed: bool = False) -> str:
        """The name of a parameter or constant of the Program, or of its transpose.

        A node that reads a parameter as it is needs no call.

        Args:
            name: the Program's.
            transposed: whether its two axes are swapped.
            packed: whether its bytes are pairs of E2M1 numbers, [..., K/2] for [..., K].
        """
        program = self._program
        own = program.weights.get(name)
        tensor = program.constants[name] if own is None else own
        dtype = tensor.dtype if own is None else program.run_dtype(name)
        known, value = self._weights.add(name, tensor, dtype, transposed)
        if known not in self._read:
            self._taken[known] += 1
            kind, shape = _type(known, dtype), tuple(value.shape)
            if packed:
                kind, shape = unpacked(shape)
            self._read[known] = TensorProto(name=known, data_type=kind, dims=shape)
        return known

    def is_parameter(self, name: str) -> bool:
        """Whether a name is that of a parameter of the Program."""
        return name in self._program.weights

    def tensor(self, value: Value, dtype: torch.dtype) -> str:
        """An operand: the name of a tensor as it is, or a number as a constant."""
        return value if isinstance(value, str) else self.constant(value, dtype)

    def _fresh(self, stem: str) -> str:
        self._taken[stem] += 1
        count = self._taken[stem]
        return stem if count == 1 else self._fresh(f"{stem}_{count}")


def cast(to: Emitter, value: str, before: torch.dtype, dtype: torch.dtype) -> str:
    """A value in another dtype; itself where it has it."""
    return value if before == dtype else to.op("Cast", value, to=TYPES[dtype])


def like(node: fx.Node) -> Tensor:
    """Shape and dtype of what a node gives."""
    value: Tensor = node.meta["val"]
    return value


def source(node: fx.Node, argument: int | str = 0) -> Tensor:
    """Shape and dtype of a node's argument, by its place or by its parameter's name."""
    if isinstance(argument, str):
        names = [each.name for each in op_of(node)._schema.arguments]
        given = node.kwargs.get(argument) or node.args[names.index(argument)]
    else:
        given = node.args[argument]
    assert isinstance(given, fx.Node)
    return like(given)


def _plain(argument: Any, made: dict[fx.Node, Value]) -> Any:
    """An argument with the values of nodes in their place."""
    if isinstance(argument, fx.Node):
        return made[argument]
    if isinstance(argument, (list, tuple)):
        return [_plain(each, made) for each in argument]
    if isinstance(argument, dict):
        return {key: _plain(each, made) for key, each in argument.items()}
    return argument


def unpacked(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """ONNX's type and shape of what lltk holds as pairs of E2M1 numbers in bytes of this shape."""
    return TensorProto.FLOAT4E2M1, (*shape[:-1], 2 * shape[-1])


def described(name: str, spec: TensorSpec, dialect: Dialect) -> ValueInfoProto:
    """An input or output of a graph; TensorRT's have E2M1 numbers where lltk has bytes."""
    kind, shape = _type(name, spec.dtype), spec.shape
    if dialect is Dialect.TENSORRT and spec.dtype is torch.uint8:
        kind, shape = unpacked(shape)
    return helper.make_tensor_value_info(name, kind, shape)


def _type(name: str, dtype: torch.dtype) -> int:
    if dtype not in TYPES:
        raise ValueError(f"{name}: is {dtype}, which this version does not export")
    return TYPES[dtype]
