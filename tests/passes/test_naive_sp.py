"""naive_sp divides [clean; noisy] among ranks as it stands."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import CANONICAL, after, reached, refused

from lltk.graph.edit import calls
from lltk.graph.facts import Ranks
from lltk.graph.program import Program
from lltk.ops.implementations import overload

pytestmark = pytest.mark.cpu

STEPS = (*CANONICAL, "text_per_chunk")


def divided(size: int, **geometry: Any) -> Program:
    before = reached("train", *STEPS, frames=12, **geometry)
    return after(before, {"naive_sp": {"size": size}})


def test_a_rank_has_an_equal_part_of_clean_and_noisy_chunks() -> None:
    program = divided(2)
    contract = program.contract("train")
    assert {name: spec.shape for name, spec in contract.inputs.items()} == {
        "hidden_states": (1, 4, 12, 4, 4),
        "timestep": (1, 12),
        "encoder_hidden_states": (1, 6, 5, 16),
        "positions": (12,),
    }
    assert contract.outputs["sample"].shape == (1, 4, 12, 4, 4)
    assert program.fact(Ranks).count == 2
    assert program.log[-1].matches == {"inputs": 4, "self-attention": 2}


def test_the_mask_is_that_of_one_rank() -> None:
    """Parts in the order of ranks are the whole sequence in its order."""
    (graph,) = divided(2).graphs.values()
    for node in calls(graph, overload("block_causal_attention")):
        assert node.args[4:] == (True,)


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert "size: 4 ranks cannot share 2 heads and 12 clean and noisy chunks" in refused(divided, 4)
    assert "size" in refused(divided, 3)


def test_needs_a_prompt_a_chunk() -> None:
    program = reached("train", *CANONICAL, frames=12)
    assert "text_per_chunk before it" in refused(after, program, "naive_sp")
