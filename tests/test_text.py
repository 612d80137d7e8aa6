"""Graphs as text: every graph of every stage comes back the same; what is no graph is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import PASSES, after, reached, refused, run, same, texts
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx

from lltk.graph.contract import Role
from lltk.graph.edit import copy_graph, output, role_of
from lltk.graph.geometry import Kind
from lltk.graph.program import Program
from lltk.graph.text import parse, print_graph, type_text

pytestmark = pytest.mark.cpu
aten = torch.ops.aten

FLAT = [
    (kind, PASSES[kind][:length])
    for kind in PASSES
    for length in range(PASSES[kind].index("regionalise") + 1)
]


def identity(flat: tuple[Kind, tuple[str, ...]]) -> str:
    return f"{flat[0]}-{flat[1][-1] if flat[1] else 'captured'}"


def values_of(program: Program) -> dict[str, Tensor]:
    return program.weights | program.constants


@pytest.mark.parametrize("flat", FLAT, ids=identity)
def test_every_flat_graph_comes_back(flat: tuple[Kind, tuple[str, ...]]) -> None:
    kind, steps = flat
    program = reached(kind, *steps, layers=1)
    for name, graph in program.graphs.items():
        text = print_graph(graph, name)
        back = parse(text, values_of(program))
        assert print_graph(back, name) == text
        back.lint()
        kept = [node for node in graph.nodes if node.op != "get_attr"]
        read = [node for node in back.nodes if node.op != "get_attr"]
        assert [signature(node) for node in read] == [signature(node) for node in kept]


def signature(node: fx.Node) -> tuple[object, ...]:
    return node.op, node.name, node.target, node.meta.get("module"), type_text(node.meta.get("val"))


@pytest.mark.parametrize("kind", PASSES)
def test_every_region_comes_back(kind: Kind) -> None:
    regional = PASSES[kind].index("regionalise") + 1
    program = reached(kind, *PASSES[kind][:regional], layers=1)
    assert program.regions
    for name, region in program.regions.items():
        text = print_graph(region.graph, name)
        assert print_graph(parse(text), name) == text


def test_a_graph_read_back_computes_the_same() -> None:
    program = reached("stream", *PASSES["stream"][:6], layers=1)
    back = after(program)
    back.graphs = {name: parse(text, values_of(program)) for name, text in texts(program).items()}
    names = program.contract("prologue").inputs
    given = {name: torch.randn(spec.shape) for name, spec in names.items()}
    wanted = run(program, "prologue", given)
    assert same(run(back, "prologue", given), wanted)


def test_equal_text_is_equal_graphs_only() -> None:
    """An argument, an operator or an output's name that differs shows in the text."""
    text = "def f(x: f32[2]):\n    # a.b\n    y: f32[2] = aten.add.Tensor(x, 1.5)\n"
    text += "    return {'z': y}\n"
    assert print_graph(parse(text), "f") == text
    for old, new in (("1.5", "1.25"), ("aten.add", "aten.mul"), ("'z'", "'w'"), ("a.b", "a.c")):
        changed = text.replace(old, new)
        assert print_graph(parse(changed), "f") == changed != text


def test_roles_come_back() -> None:
    text = (
        "def f(x: latents(f32[2]), y: f32[2]):\n    # root\n    z: f32[2] = aten.add.Tensor(x, y)\n"
    )
    text += "    return {'z': z}\n"
    graph = parse(text)
    assert [role_of(node) for node in graph.find_nodes(op="placeholder")] == [Role.LATENTS, None]
    assert print_graph(graph, "f") == text
    assert print_graph(copy_graph(graph), "f") == text
    message = refused(parse, text.replace("latents", "latent"))
    assert message.startswith("latent is no role; there are latents, clean, ")


ARGUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.sampled_from([torch.float32, torch.bfloat16, torch.strided, torch.contiguous_format])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@example([float("inf"), float("-inf")], {})
@given(st.lists(ARGUMENTS, max_size=3), st.dictionaries(st.sampled_from("abc"), ARGUMENTS))
def test_every_argument_comes_back(args: list[object], kwargs: dict[str, object]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = {"val": torch.empty(2), "module": ""}
    call = graph.call_function(aten.add.Tensor, (x, *args), kwargs)
    call.meta = {"val": torch.empty(2), "module": "m"}
    graph.output({"y": call})
    text = print_graph(graph, "f")
    back = parse(text)
    (again,) = back.find_nodes(op="call_function", target=aten.add.Tensor)
    assert print_graph(back, "f") == text
    assert again.args[1:] == call.args[1:] and again.kwargs == call.kwargs


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
DTYPES += [torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 4)], ids=str)
def test_every_type_comes_back(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        text = f"def f(x: {type_text(torch.empty(shape, dtype=dtype))}):\n    return {{'y': x}}\n"
        value = output(parse(text)).args[0]["y"].meta["val"]
        assert (tuple(value.shape), value.dtype) == (shape, dtype)


# Refusals


def one_line(line: str) -> str:
    return f"def f(x: f32[2]):\n    {line}\n    return {{'y': x}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "graph text starts with 'def name(...):'"),
        (one_line("y: f32[2] = os.system(x)"), "os.system is not an operator of torch.ops"),
        (one_line("y: f32[2] = aten.ad.Tensor(x)"), "aten.ad.Tensor is not an operator"),
        (one_line("y: f32[2] = aten.add(x, 1)"), "aten.add is not an operator of torch.ops"),
        (one_line("y: f32[2] = load_library(x)"), "load_library is not an operator of torch.ops"),
        (one_line("y: f32[2] = aten.neg.default(z)"), "line 2: 'z' is read before it is assigned"),
        (one_line("y = aten.neg.default(x)"), "line 2: expected 'name: type = operator(...)'"),
        (one_line("import os"), "line 2: expected 'name: type = operator(...)'"),
        (one_line("y: f32[2] = x"), "line 2: expected a call"),
    ],
)
def test_what_is_no_graph_is_refused(text: str, message: str) -> None:
    assert message in refused(parse, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def f(",
        "import os\ndef f(x: f32[2]):\n    return {'y': x}",
        "def f(x: f32[2]):\n    return",
        "def f(x: q7[2]):\n    return {'y': x}",
        "def f(x):\n    return {'y': x}",
        one_line("y: f32[2] = aten.add.Tensor(x, torch.nothing)"),
        one_line("y: f32[2] = aten.add.Tensor(x, torch.load)"),
        one_line("y: f32[2] = aten.add.Tensor(x, __import__('os'))"),
    ],
    ids=["empty", "syntax", "two", "return", "dtype", "untyped", "attribute", "function", "call"],
)
def test_other_text_is_refused_with_a_message(text: str) -> None:
    """The error is never one of Python that says nothing about graph text."""
    message = refused(parse, text)
    assert "unpack" not in message and "malformed" not in message


@pytest.mark.parametrize("kind", [kind for kind in PASSES if "lower" in PASSES[kind]])
def test_calls_of_blocks_and_of_functions_are_not_parsed(kind: Kind) -> None:
    program = reached(kind, *PASSES[kind], layers=1)
    graphs = texts(program)
    name = "step" if kind == "stream" else kind
    assert "self['blocks.0'] is not an operator" in refused(parse, graphs[name])
    op = "paged_attention" if kind == "stream" else "block_causal_attention"
    message = refused(parse, graphs[f"{name}_block"])
    assert f"{op}.sdpa.{op} is not an operator of torch.ops" in message
