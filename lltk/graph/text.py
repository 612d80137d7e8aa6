"""Graphs as text: one line a node, read back by `parse`.

The text is a subset of Python: inputs with their roles and types, one annotated assignment a call,
a comment where the module path changes::

    def step(x: latents(f32[1, 8, 4])):
        # blocks.0.ffn
        linear: f32[1, 8, 4] = aten.linear.default(x, self['blocks.0.ffn.weight'])
        return {'sample': linear}
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lltk.graph.contract import Role
from lltk.graph.edit import module_of, role_of
from lltk.ops.implementations import register_ops

_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f8e4m3": torch.float8_e4m3fn,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "b8": torch.bool,
}
_SHORT = {dtype: short for short, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name, as ``bf16``."""
    if dtype not in _SHORT:
        raise ValueError(f"graph text has no name for {dtype}; it has {', '.join(_DTYPES)}")
    return _SHORT[dtype]


def dtype_named(short: str) -> torch.dtype:
    """The dtype of a short name."""
    if short not in _DTYPES:
        raise ValueError(f"{short!r} is no dtype; there are {', '.join(_DTYPES)}")
    return _DTYPES[short]


def type_text(value: Any) -> str:
    """``f32[1, 8, 4]`` for a tensor, a tuple of those for several."""
    if isinstance(value, Tensor):
        sizes = ", ".join(str(int(size)) for size in value.shape)
        return f"{dtype_name(value.dtype)}[{sizes or '()'}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(type_text(item) for item in value)},)"
    return "None"


def print_graph(graph: fx.Graph, name: str) -> str:
    """The graph as text. Graphs with the same text differ in the values of constants at most."""
    inputs = graph.find_nodes(op="placeholder")
    parameters = ", ".join(f"{node.name}: {_input_text(node)}" for node in inputs)
    lines = [f"def {name}({parameters}):"]
    module = None
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            lines.append(f"    return {_argument(node.args[0])}")
            continue
        if module_of(node) != module:
            module = module_of(node)
            lines.append(f"    # {module or 'root'}")
        arguments = [_argument(a) for a in node.args]
        arguments += [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
        call = f"{target_name(node)}({', '.join(arguments)})"
        lines.append(f"    {node.name}: {type_text(node.meta.get('val'))} = {call}")
    return "\n".join(lines) + "\n"


def _input_text(node: fx.Node) -> str:
    """``latents(f32[1, 8, 4])``; inputs of regions have no role."""
    role, text = role_of(node), type_text(node.meta["val"])
    return text if role is None else f"{role}({text})"


def target_name(node: fx.Node) -> str:
    """What a node calls: ``aten.linear.default``, or a function's path."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if node.target is operator.getitem:
        return "getitem"
    if node.op == "call_module":
        return f"self[{node.target!r}]"
    return (
        f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"
    )


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"self[{str(value.target)!r}]" if value.op == "get_attr" else value.name
    if isinstance(value, list):
        return f"[{', '.join(_argument(v) for v in value)}]"
    if isinstance(value, tuple):
        return f"({', '.join(_argument(v) for v in value)},)" if value else "()"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.device):
        return repr(str(value))
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return repr(value)


def parse(text: str, values: Mapping[str, Tensor] | None = None) -> fx.Graph:
    """The graph of a text that `print_graph` wrote.

    Nothing in the text is run. Operators are looked up in ``torch.ops`` alone.

    Args:
        text: of one graph.
        values: tensors for ``self['name']``, whose shapes and dtypes become metadata.

    Raises:
        ValueError: it is no such text, or an operator is not registered.
    """
    register_ops()
    try:
        statements = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno}: is not graph text: {error.msg}") from error
    if len(statements) != 1 or not isinstance(statements[0], ast.FunctionDef):
        raise ValueError("graph text starts with 'def name(...):' and holds nothing else")
    return _Parser(text.splitlines(), values or {}).graph(statements[0])


class _Parser:
    def __init__(self, lines: list[str], values: Mapping[str, Tensor]) -> None:
        self.lines = lines
        self.values = values
        self.out = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.module = ""

    def graph(self, function: ast.FunctionDef) -> fx.Graph:
        for argument in function.args.args:
            node = self.out.placeholder(argument.arg)
            role, annotation = self._role(argument.annotation)
            node.meta = {"val": self._type(annotation), "module": ""}
            if role is not None:
                node.meta["role"] = role
            self.nodes[argument.arg] = node
        for statement in function.body:
            self._enter_module(statement.lineno)
            if isinstance(statement, ast.Return) and statement.value is not None:
                self.out.output(self._value(statement.value))
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                self._assign(statement.target.id, statement)
            else:
                raise ValueError(f"line {statement.lineno}: expected 'name: type = operator(...)'")
        return self.out

    def _enter_module(self, line: int) -> None:
        previous = self.lines[line - 2].strip() if line > 1 else ""
        if previous.startswith("#"):
            path = previous.removeprefix("#").strip()
            self.module = "" if path == "root" else path

    def _assign(self, name: str, statement: ast.AnnAssign) -> None:
        call = statement.value
        if not isinstance(call, ast.Call):
            raise ValueError(f"line {statement.lineno}: expected a call")
        args = tuple(self._value(a) for a in call.args)
        kwargs = {str(k.arg): self._value(k.value) for k in call.keywords}
        target = self._target(ast.unparse(call.func))
        node = self.out.create_node("call_function", target, args, kwargs, name=name)
        node.meta = {"val": self._type(statement.annotation), "module": self.module}
        self.nodes[name] = node

    @staticmethod
    def _target(name: str) -> Any:
        if name == "getitem":
            return operator.getitem
        found: Any = torch.ops
        for part in name.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, torch._ops.OpOverload):
            raise ValueError(f"{name} is not an operator of torch.ops")
        return found

    def _attribute(self, name: str) -> fx.Node:
        if name not in self.nodes:
            node = self.out.create_node("get_attr", name, name=name.replace(".", "_"))
            node.meta = {"val": self.values.get(name), "module": name.rpartition(".")[0]}
            self.nodes[name] = node
        return self.nodes[name]

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id):
                if id not in self.nodes:
                    raise ValueError(f"line {node.lineno}: {id!r} is read before it is assigned")
                return self.nodes[id]
            case ast.Subscript(ast.Name("self"), ast.Constant(name)):
                return self._attribute(str(name))
            case ast.Attribute(ast.Name("torch"), attribute):
                found = getattr(torch, attribute, None)
                if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
                    return found
            case ast.Call(ast.Name("float"), [ast.Constant(text)]):
                return float(str(text))
            case ast.List(items):
                return [self._value(item) for item in items]
            case ast.Tuple(items):
                return tuple(self._value(item) for item in items)
            case ast.Dict(keys, items):
                names = [ast.literal_eval(key) for key in keys if key is not None]
                return dict(zip(names, map(self._value, items), strict=True))
            case ast.Constant() | ast.UnaryOp(ast.USub(), ast.Constant()):
                return ast.literal_eval(node)
            case ast.UnaryOp(ast.USub(), ast.Call()):
                return -self._value(node.operand)
        raise ValueError(f"line {node.lineno}: {ast.unparse(node)!r} is no argument of a call")

    @staticmethod
    def _role(node: ast.expr | None) -> tuple[Role | None, ast.expr | None]:
        """An input's role, if it has one, and its type."""
        match node:
            case ast.Call(ast.Name(role), [annotation]):
                if role not in list(Role):
                    raise ValueError(f"{role} is no role; there are {', '.join(Role)}")
                return Role(role), annotation
        return None, node

    def _type(self, node: ast.expr | None) -> Any:
        match node:
            case ast.Subscript(ast.Name(short), sizes) if short in _DTYPES:
                size = ast.literal_eval(sizes)
                return torch.empty(size, dtype=_DTYPES[short], device="meta")
            case ast.Constant(None):
                return None
            case ast.Tuple(items):
                return tuple(self._type(item) for item in items)
        found = "no type" if node is None else ast.unparse(node)
        raise ValueError(f"expected a type as f32[2, 3], found {found}")
