"""The pass that makes graphs which mutate nothing, against the graphs that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers import PASSES, after, difference, inputs, reached, refused, run, same
from torch import Tensor

from lltk.graph.contract import Role, page_output
from lltk.graph.edit import building, inputs_of, op_of
from lltk.graph.facts import Ranks
from lltk.graph.program import Program
from lltk.ops.rope_table.reference import rope_table

pytestmark = pytest.mark.cpu

BEFORE = PASSES["stream"][:6]
TABLES = ((), (2,), (2, 0, 1), (0, 1, 2), (3, 1))
SIZES = {"layers": 3, "height": 64, "width": 96}


def original() -> Program:
    return reached("stream", *BEFORE, **SIZES)


def external() -> Program:
    return reached("stream", *BEFORE, "externalise", **SIZES)


def given(program: Program, graph: str, table: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of the original graph, at positions that are no whole numbers."""
    made = inputs(program, graph)
    contract = program.contract(graph)
    made[contract.name(Role.TABLE)] = torch.tensor(table, dtype=torch.int64)
    made[contract.name(Role.POSITIONS)] += 7.25
    return made


def translated(program: Program, graph: str, old: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for the graph that the pass made."""
    spec, geometry = program.spec, program.geometry
    height, width = geometry.grid(spec)
    split = list(spec.rope_split)
    cos, sin = rope_table(old["positions"], height, width, split, spec.rope_theta)
    listed = torch.zeros(geometry.pages, dtype=torch.bool)
    listed[old["table"]] = True
    values = {**old, "rotary_cos": cos, "rotary_sin": sin, "listed": listed}
    return {name: values[name] for name in program.contract(graph).inputs}


@pytest.mark.parametrize("table", TABLES)
def test_step_gives_the_same(table: tuple[int, ...]) -> None:
    old = given(original(), "step", table)
    new = translated(external(), "step", old)
    wanted = run(original(), "step", old)
    assert difference(run(external(), "step", new), wanted) < 2e-6
    other = translated(external(), "step", {**old, "table": torch.tensor([3])})
    assert difference(run(external(), "step", other), wanted) > 1e-3


@pytest.mark.parametrize("table", TABLES[:4])
def test_commit_gives_what_was_written(table: tuple[int, ...]) -> None:
    """Also where the slot's own page lies in the arena, which no table lists."""
    old = given(original(), "commit", table)
    pages = original().pages
    written = run(original(), "commit", old)
    assert written.keys() == pages.keys()
    slot = int(old["slot"])
    wanted = {page_output(name): written[name][:, slot] for name in pages}
    found = run(external(), "commit", translated(external(), "commit", old))
    assert difference(found, wanted) < 2e-6


@pytest.mark.parametrize("graph", ["step", "commit"])
def test_unlisted_pages_are_not_read(graph: str) -> None:
    """A NaN there does not reach the result; in a listed page it does."""
    old = given(original(), graph, (0, 2))
    new = translated(external(), graph, old)
    wanted = run(external(), graph, new)
    broken = {name: value.clone() for name, value in new.items()}
    for name in external().contract(graph).pages:
        broken[name][:, [1, 3]] = float("nan")
    assert difference(_results(external(), graph, broken), wanted) == 0
    broken["listed"][1] = True
    results = _results(external(), graph, broken).values()
    assert not all(bool(value.isfinite().all()) for value in results)


def test_contracts() -> None:
    """Inputs that a graph does not read are gone: of the commit its last layer's pages."""
    step, commit = external().contract("step"), external().contract("commit")
    assert step.input(Role.LISTED).shape == (4,)
    assert step.pages == original().pages == external().pages
    assert set(step.pages) - set(commit.pages) == {"k_pages_2", "v_pages_2"}
    assert list(commit.outputs) == [page_output(name) for name in original().pages]
    assert not (commit.having(Role.TIME) or commit.having(Role.SLOT))
    assert external().contract("prologue") == original().contract("prologue")


def test_shapes_do_not_depend_on_the_table() -> None:
    shapes = {
        name: [tuple(n.meta["val"].shape) for n in graph.nodes if n.name == "listed_attention"]
        for name, graph in external().graphs.items()
    }
    assert shapes["step"] == shapes["commit"] == [(1, 2 * 2 * 3, 2, 12)]


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("pages", ["decoded", "stored"])
def test_pages_in_nvfp4(smoothing: bool, pages: str) -> None:
    """They are decoded before attention or by it, and given part by part."""
    cache = {"nvfp4_cache": {"smoothing": smoothing}}
    old = after(reached("stream", *BEFORE, head_dim=16, **SIZES), cache)
    new = after(old, {"externalise": {"pages": pages}})
    names = [str(op_of(node)) for node in new.graphs["step"].nodes if node.op == "call_function"]
    attending = [name for name in names if name.startswith("lltk.") and "attention" in name]
    op = "listed_attention" if pages == "decoded" else "nvfp4_listed_attention"
    assert attending == [f"lltk.{op}.default"] * 3
    assert ("lltk.nvfp4_decode_pages.default" in names) is (pages == "decoded")
    step = given(old, "step", (2, 0))
    outside = {**translated(new, "step", step)}
    for name, spec in new.contract("step").pages.items():
        outside[name] = outside[name].clone()
        outside[name][:, [1, 3]] = 255 if spec.dtype == torch.uint8 else torch.nan
    made = _results(new, "step", outside)
    assert difference(made, run(old, "step", step)) < 2e-6
    commit = given(old, "commit", (2, 0))
    written, slot = run(old, "commit", commit), int(commit["slot"])
    found = run(new, "commit", translated(new, "commit", commit))
    assert found.keys() == {page_output(name) for name in old.pages}
    assert len(found) == 3 * 2 * (4 if smoothing else 3)
    for name in old.pages:
        if name.endswith("_0"):  # the first layer's follow from no attention
            part = written[name][:, slot]
            assert same({name: part.contiguous()}, {name: found[page_output(name)]}), name


def test_attention_to_fp8() -> None:
    """What was fused with its quantiser is taken apart."""
    steps = ("nvfp4_cache", "fp8_infer", "fuse_attention_quantise")
    old = after(reached("stream", *BEFORE, head_dim=16, **SIZES), *steps)
    new = after(old, "externalise")
    step = given(old, "step", (1,))
    assert (
        difference(run(new, "step", translated(new, "step", step)), run(old, "step", step)) < 1e-2
    )
    names = [str(op_of(node)) for node in new.graphs["step"].nodes]
    assert names.count("lltk.listed_attention.default") == 3


def test_pages_that_are_kept_decoded_are_refused() -> None:
    steps = ("nvfp4_cache", "fp8_infer", {"fuse_attention_quantise": {"keep_decoded": True}})
    old = after(reached("stream", *BEFORE, head_dim=16, **SIZES), *steps)
    assert "remove keep_decoded of fuse_attention_quantise" in refused(after, old, "externalise")


def _results(program: Program, graph: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a graph gives; `run` takes a NaN in an input for something written."""
    made = run(program, graph, given)
    return {name: made[name] for name in program.contract(graph).outputs}


def test_what_has_no_such_form_is_refused() -> None:
    other = after(original())
    graph = other.graphs["step"]
    (table,) = inputs_of(graph, Role.TABLE)
    with building(next(iter(table.users))) as build:
        build(torch.ops.aten.clone.default, table).meta["val"] = table.meta["val"]
    message = refused(after, other, "externalise")
    assert "externalise: clone (blocks.0.attn1): aten.clone.default reads the table" in message
    assert "remove the pass" in message
    program = replace(original(), facts={Ranks: Ranks(2)})
    assert "is for one process, the program is for 2" in refused(after, program, "externalise")
