"""What a Program holds beside its graphs: facts, roles of linears, and how its module is called."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from helpers import HAND_SPEC, PASSES, after, hand_made, reached

from lltk.graph.contract import Role
from lltk.graph.edit import calls, sort_topologically
from lltk.graph.facts import Ranks, Trainable
from lltk.graph.module import instantiate
from lltk.graph.recipe import Recipe
from lltk.graph.spec import LinearRole
from lltk.graph.stages import Stage
from lltk.models.families import FAMILIES, family_of

pytestmark = pytest.mark.cpu

TEXT = """
    def score(hidden_states: latents(f32[2]), timestep: time(f32[2])):
        # root
        add: f32[2] = aten.add.Tensor(hidden_states, timestep)
        return {'sample': add}
"""


@dataclass(frozen=True)
class Mine:
    """A fact of a user's own pass."""

    value: int = 3


def test_a_graph_that_cannot_be_sorted_is_named() -> None:
    graph = hand_made("score", Stage.CAUSAL, {"score": TEXT}).graphs["score"]
    (add,) = calls(graph, torch.ops.aten.add.Tensor)
    add.update_arg(1, add)
    with pytest.raises(AssertionError, match="add is computed from itself"):
        sort_topologically(graph)


def test_facts_are_found_by_their_class() -> None:
    program = hand_made("score", Stage.CAUSAL, {"score": TEXT})
    assert program.fact(Mine) == Mine(3) and program.fact(Ranks) == Ranks(1)
    program.leave(Mine(4))
    program.leave(Ranks(2))
    program.leave(Mine(5))
    assert program.fact(Mine).value == 5 and program.fact(Ranks).count == 2


def test_passes_leave_facts_in_a_copy() -> None:
    before = reached("score", *PASSES["score"][:1])
    adapted = after(before, {"lora": {"rank": 2}})
    assert before.fact(Trainable).names is None and adapted.fact(Trainable).names
    assert len(adapted.state_maps) == len(before.state_maps) + 1


def test_a_linear_has_the_role_that_its_path_says() -> None:
    spec = replace(HAND_SPEC, layers=2)
    roles = {role: path.format(layer=1) for role, path in spec.linears.items()}
    assert {role: spec.linear_role(path) for role, path in roles.items()} == {r: r for r in roles}
    assert spec.linear_role("blocks.1.attn1.to_q") is LinearRole.SELF_QUERY
    for other in ("blocks.1.attn1.to_q.lora_A", "blocks.1.attn1", "proj_out", "attn1.to_q"):
        assert spec.linear_role(other) is None, other


def test_every_kind_of_program_is_of_one_family() -> None:
    for kind in get_args(Recipe.model_fields["program"].annotation):
        assert family_of(kind) in FAMILIES
    assert family_of("stream") is family_of("train") is not family_of("decode")


def test_a_call_takes_its_inputs_out_of_the_dict() -> None:
    program = hand_made("score", Stage.CAUSAL, {"score": TEXT})
    module = instantiate(program)
    given = {"timestep": torch.ones(2), "hidden_states": torch.tensor([1.0, 2.0])}
    assert module("score", dict(given))["sample"].tolist() == [2.0, 3.0] and len(given) == 2
    module("score", given)
    assert not given
    with pytest.raises(KeyError, match="hidden_states"):
        module("score", {"timestep": torch.ones(2)})
    with pytest.raises(AssertionError, match="score reads no other"):
        module("score", {name: torch.ones(2) for name in ("hidden_states", "timestep", "other")})


def test_values_are_named_by_role() -> None:
    contract = reached("train", *PASSES["train"][:5]).contract("train")
    values = {Role.TIME: 1, Role.CLEAN: 2, Role.SLOT: 3}
    assert contract.named(values) == {"timestep": 1, "clean": 2}
    assert contract.name(Role.LATENTS) == "noisy"
    assert contract.input(Role.POSITIONS).dtype == torch.float64
    assert not contract.having(Role.SLOT)
