"""A Program's graphs as ONNX: a walk over their nodes, with a function for each op.

The functions are in the modules beside this one, a module a family of ops. Blocks' regions are
written out for every layer. Parameters are not in the graphs: they name them in a `WeightPool`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor, fx

from lltk.export.weights import WeightPool
from lltk.graph.edit import module_of, op_of, output, results_of
from lltk.graph.program import Program

OPSET = 23
IR_VERSION = 11
"""The oldest that has this opset; newer ones are refused by older runtimes."""
_FAMILIES = ("arithmetic", "attention", "images", "linears", "nvfp4", "rows", "shapes")
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
_RULES: dict[object, Rule] = {}


def emits(*ops: object) -> Callable[[Rule], Rule]:
    """Register what emits some ops: a function of the emitter, the node and its arguments."""

    def register(rule: Rule) -> Rule:
        for op in ops:
            assert op not in _RULES, f"{op} has a rule"
            _RULES[op] = rule
        return rule

    return register


class Emitter:
    """Emits one graph.

    Args:
        program: whose graph it is.
        weights: takes the parameters that the graph reads.
    """

    def __init__(self, program: Program, weights: WeightPool) -> None:
        for family in _FAMILIES:
            import_module(f"{__package__}.{family}")
        self._program, self._weights = program, weights
        self._nodes: list[NodeProto] = []
        self._constants: dict[tuple[Any, ...], TensorProto] = {}
        self._read: dict[str, TensorProto] = {}
        self._taken: Counter[str] = Counter()
        self._scope = ""

    def emit(self, name: str) -> ModelProto:
        """The model of a named graph; its parameters are described, and lie in the pool's file.

        Raises:
            ValueError: an op has no form in ONNX here; names it with its node and module.
        """
        graph, contract = self._program.graphs[name], self._program.contract(name)
        if (dtype := self._program.dtype) != torch.float32:
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
            [_described(each, spec.shape, spec.dtype) for each, spec in contract.inputs.items()],
            [_described(each, spec.shape, spec.dtype) for each, spec in contract.outputs.items()],
            [*self._read.values(), *self._constants.values()],
        )
        opset = [helper.make_opsetid("", OPSET)]
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
                rule = _RULES.get(op_of(node))
                path = ".".join(part for part in (owner, module_of(node)) if part) or "root"
                if rule is None:
                    raise ValueError(
                        f"{name}: {node.name} ({path}): {op_of(node)} has no form in ONNX in this "
                        "version; remove the pass that made it from the recipe"
                    )
                self._scope = path
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
        name = self._fresh(f"{self._scope}/{kind}")
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

    def parameter(self, name: str, transposed: bool = False) -> str:
        """The name of a parameter or constant of the Program, or of its transpose.

        A node that reads a parameter as it is needs no call.
        """
        program = self._program
        own = program.weights.get(name)
        tensor = program.constants[name] if own is None else own
        dtype = tensor.dtype if own is None else program.run_dtype(name)
        known, value = self._weights.add(name, tensor, dtype, transposed)
        if known not in self._read:
            self._taken[known] += 1
            self._read[known] = TensorProto(
                name=known, data_type=_type(known, dtype), dims=list(value.shape)
            )
        return known

    def tensor(self, value: Value, dtype: torch.dtype) -> str:
        """An operand: the name of a tensor as it is, or a number as a constant."""
        return value if isinstance(value, str) else self.constant(value, dtype)

    def _fresh(self, stem: str) -> str:
        self._taken[stem] += 1
        count = self._taken[stem]
        return stem if count == 1 else self._fresh(f"{stem}_{count}")


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


def _described(name: str, shape: Iterable[int], dtype: torch.dtype) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, _type(name, dtype), list(shape))


def _type(name: str, dtype: torch.dtype) -> int:
    if dtype not in TYPES:
        raise ValueError(f"{name}: is {dtype}, which this version does not export")
    return TYPES[dtype]
