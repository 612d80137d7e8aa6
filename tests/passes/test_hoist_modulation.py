"""hoist_modulation: the modulations of all blocks are computed at once, before the blocks."""

from __future__ import annotations

import pytest
import torch
from helpers import PASSES, after, compare_results, reached, refused

from lltk.graph.edit import calls, module_of, output, results_of
from lltk.graph.program import Program

aten = torch.ops.aten

pytestmark = pytest.mark.cpu

CAUSAL = PASSES["stream"][:6]


def made(dtype: str = "bfloat16", *more: str) -> Program:
    return reached("stream", *CAUSAL, *more, dtype=dtype, head_dim=16, layers=3)


def small_calls(program: Program, name: str) -> list[str]:
    """What the blocks of a graph compute of the timestep, by module."""
    graph = program.graphs[name]
    found = [*calls(graph, aten.chunk.default), *calls(graph, aten.squeeze.dim)]
    found += [n for n in calls(graph, aten.add.Tensor) if n.args[1:] == (1,)]
    return [module_of(node) for node in found if module_of(node).startswith("blocks.")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_stay(dtype: str) -> None:
    plain = made(dtype)
    program = after(plain, "hoist_modulation")
    compare_results(plain, program, "step", "timestep", lambda levels: levels.flip(1))


def test_what_is_rewritten() -> None:
    """Every block of a step and a commit; a table stays its block's parameter."""
    plain = made()
    program = after(plain, "hoist_modulation")
    assert program.log[-1].matches == {"blocks": 2 * 3}
    assert program.weights.keys() == plain.weights.keys()
    for name in ("step", "commit"):
        assert small_calls(plain, name) and not small_calls(program, name)
        stacks = calls(program.graphs[name], aten.stack.default)
        (stack,) = (node for node in stacks if not module_of(node))
        tables = [str(node.target) for node in stack.all_input_nodes]
        assert tables == [f"blocks.{layer}.scale_shift_table" for layer in range(3)]
    region = after(program, "regionalise").regions["step_block"]
    parts = [name for name in region.inputs if name.startswith("modulation")]
    raised = ("modulation_1_plus_1", "modulation_4_plus_1")
    assert sorted(parts) == sorted([*(f"modulation_{place}" for place in (0, 2, 3, 5)), *raised])
    assert "scale_shift_table" not in region.parameters


def test_sums_meet_the_norms_of_next_blocks() -> None:
    """Each block but the first begins with the sum that the one before ends with."""
    steps = ("fp8_infer", "fuse_rows")
    apart = after(made(), *steps).log[-1].matches
    together = after(made(), "hoist_modulation", *steps).log[-1].matches
    assert apart["gated sum"] == 2 + 3 and apart["modulated norm → fp8"] == 2 * 3
    assert together.pop("gated sum → modulated norm → fp8") == 2 * 2
    assert together.pop("gated sum → modulated norm") == 1
    assert together.pop("modulated norm → fp8") == 2
    assert together.items() <= apart.items()


@pytest.mark.parametrize("what", ["read whole", "of a block", "split otherwise"])
def test_others_stay(what: str) -> None:
    program = after(made())
    for graph in program.graphs.values():
        for node in calls(graph, aten.chunk.default):
            (total,) = node.all_input_nodes
            if what == "read whole":
                end = output(graph)
                end.args = ({**results_of(graph), node.name: total},)
            elif what == "of a block":
                total.args = (total.args[0], total.args[0])
            else:
                node.args = (total, 3, 2)
    message = refused(after, program, "hoist_modulation")
    assert "splits no sum of a block's table and a pass's modulation" in message
