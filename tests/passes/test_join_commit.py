"""The pass that makes step and commit one graph, against the two graphs that it is made of."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import PASSES, after, inputs, reached, refused, run, same

from lltk.graph.contract import Role, page_output
from lltk.graph.program import Program
from lltk.graph.verify import STEP_HIGH

pytestmark = pytest.mark.cpu

BEFORE = PASSES["stream"][:6]
Step = str | dict[str, Any]
KINDS: dict[str, tuple[Step, ...]] = {
    "plain": (),
    "smooth pages": ({"nvfp4_cache": {"smoothing": True}},),
    "w4a4": ("nvfp4_cache", "nvfp4_infer"),
    "fp8": ("merge_qkv", "fp8_infer"),
}


def external(*steps: Step) -> Program:
    return after(reached("stream", *BEFORE, head_dim=16), *steps, "externalise")


def reads(program: Program, graph: str) -> set[str]:
    """The parameters that a graph reads."""
    return {str(node.target) for node in program.graphs[graph].find_nodes(op="get_attr")}


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_gives_what_two_gave(kind: str) -> None:
    """To the bit: a sample at any time, and a commit's pages at timesteps of 0."""
    apart = external(*KINDS[kind])
    joint = after(apart, "join_commit")
    assert set(joint.graphs) == {"prologue", "step"} and joint.commit_graph == "step"
    assert joint.contract("step").inputs == apart.contract("step").inputs
    assert list(joint.contract("step").outputs) == ["sample", *map(page_output, apart.pages)]
    given = inputs(joint, "step")
    made, wanted = run(joint, "step", given), run(apart, "step", given)
    assert same({"sample": made["sample"]}, {"sample": wanted["sample"]})
    clean = {**given, "timestep": 0 * given["timestep"]}
    committed = {name: clean[name] for name in apart.contract("commit").inputs}
    pages = run(apart, "commit", committed)
    found = run(joint, "step", clean)
    assert same({name: found[name] for name in pages}, pages) and len(pages) == len(apart.pages)
    last = page_output(list(apart.pages)[-1])
    assert not same({last: made[last]}, {last: pages[last]}), "timesteps matter"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_parameter_is_computed_twice(kind: str) -> None:
    apart = external(*KINDS[kind])
    joint = after(apart, "join_commit")
    assert reads(joint, "step") == reads(apart, "step")
    for graph in (apart, joint):
        users = [len(node.users) for node in graph.graphs["step"].find_nodes(op="get_attr")]
        assert sum(users) == len(users), "each parameter has one reader"
    extra = len(joint.graphs["step"].nodes) - len(apart.graphs["step"].nodes)
    arenas = len(apart.pages)
    assert extra == (0 if kind in ("plain", "fp8") else arenas + 2 * 2), "pages are quantised"


def test_a_commit_in_high_precision() -> None:
    """It is the step in high precision, and has a graph of its own where there is none."""
    keep = {"keep_commit": True}
    alone = after(external({"nvfp4_infer": keep}), "join_commit")
    assert set(alone.graphs) == {"prologue", "step", "commit"} and alone.log[-1].matches == {}
    assert not alone.contract("step").gives_pages and alone.commit_graph == "commit"
    both = after(external({"nvfp4_infer": {**keep, "keep_steps": [0]}}), "join_commit")
    assert set(both.graphs) == {"prologue", "step", STEP_HIGH} and both.commit_graph == STEP_HIGH
    assert not both.contract("step").gives_pages
    assert set(after(both, "regionalise").graphs) == set(both.graphs)


def test_a_commit_that_writes_is_refused() -> None:
    program = reached("stream", *BEFORE)
    assert program.contract("commit").having(Role.SLOT)
    assert "put externalise before it" in refused(after, program, "join_commit")
