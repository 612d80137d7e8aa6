"""merge_lora: the base graph again, its weights doing what the adapters did."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import (
    CANONICAL,
    PASSES,
    after,
    captured,
    difference,
    hand_made,
    inputs,
    randomise,
    reached,
    refused,
    run,
    same,
    text,
    texts,
)
from torch import Tensor

from lltk.compiler import with_weights
from lltk.graph.facts import Trainable
from lltk.graph.geometry import Kind
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.passes.lora import is_adapter

pytestmark = pytest.mark.cpu

BEFORE = """
    def score(hidden_states: latents(f32[1, 4, 3])):
        # blocks.0.ffn.net.2
        linear: f32[1, 4, 3] = aten.linear.default(hidden_states, \
self['blocks.0.ffn.net.2.weight'])
        linear_2: f32[1, 4, 3] = aten.linear.default(linear, self['proj_out.weight'])
        mul: f32[1, 4, 3] = aten.mul.Tensor(linear_2, 2.0)
        add: f32[1, 4, 3] = aten.add.Tensor(linear, mul)
        return {'sample': add}
"""
WEIGHTS = {"blocks.0.ffn.net.2.weight": torch.ones(3, 3), "proj_out.weight": torch.ones(3, 3)}
SMALL = {"lora": {"rank": 2, "alpha": 8.0}}
SCALE = 4.0


@cache
def learned(kind: Kind = "score", steps: tuple[str, ...] = CANONICAL) -> Program:
    """A program with adapters at random values."""
    program = after(reached(kind, *steps), SMALL)
    values = randomise({n: t for n, t in program.weights.items() if is_adapter(n)}, seed=7)
    return with_weights(program, program.weights | values)


def merged_by_hand(state: dict[str, Tensor], scale: float = SCALE) -> dict[str, Tensor]:
    """W + s·B·A in float64."""
    merged = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        a, b = (state.get(f"{module}.lora_{side}.weight") for side in "AB")
        if not is_adapter(name):
            added = 0 if a is None or b is None else scale * (b.double() @ a.double())
            merged[name] = tensor.double() + added
    return merged


def test_undoes_loras_text() -> None:
    """A sum that looks like an adapter's, but is not lora's, stays."""
    before = hand_made("score", Stage.CAUSAL, {"score": BEFORE}, WEIGHTS)
    program = after(before, SMALL, "merge_lora")
    assert text(program, "score") == text(before, "score")
    assert same(program.weights, WEIGHTS)
    assert program.fact(Trainable).names is None


@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int) -> None:
    before = reached("score", *CANONICAL, layers=layers)
    program = after(before, SMALL, "merge_lora")
    assert program.log[-1].matches == {"linears": 10 * layers}
    assert texts(program) == texts(before)


def test_merges_every_graph_of_a_stream() -> None:
    steps = PASSES["stream"][:6]
    program = after(learned("stream", steps), "merge_lora")
    assert texts(program) == texts(reached("stream", *steps))
    given = inputs(program, "step")
    wanted = run(learned("stream", steps), "step", given)
    assert difference(run(program, "step", given), wanted) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-5), (torch.float64, 1e-6)])
def test_outputs_agree_with_the_adapters(dtype: torch.dtype | None, bound: float) -> None:
    """In float64 what is left is the merged weights' own float32 rounding."""
    program = after(learned(), "merge_lora")
    given = inputs(program, "forward")
    wanted = run(learned(), "forward", given, dtype)
    assert difference(run(program, "forward", given, dtype), wanted) < bound
    unmerged = reached("score", *CANONICAL)
    assert difference(run(unmerged, "forward", given, dtype), wanted) > 0.01


def test_weights_summed_in_float64_leave_no_difference() -> None:
    program = with_weights(after(learned(), "merge_lora"), merged_by_hand(learned().weights))
    given = inputs(program, "forward")
    wanted = run(learned(), "forward", given, torch.float64)
    assert difference(run(program, "forward", given, torch.float64), wanted) < 1e-13


def test_weights_are_the_sum() -> None:
    ours = after(learned(), "merge_lora").weights
    exact = merged_by_hand(learned().weights)
    assert difference(ours, exact) < 1e-6
    assert difference(ours, merged_by_hand(learned().weights, scale=1.0)) > 0.01
    base = captured("score").weights
    changed = {name for name in ours if not torch.equal(ours[name], base[name])}
    assert changed == {
        name.replace(".lora_A", "") for name in learned().weights if ".lora_A." in name
    }


def test_low_precision_weights_keep_their_dtype() -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in learned().weights.items()}
    merged = after(learned(), "merge_lora").state_maps[-1].map_state(state)
    exact = merged_by_hand(state)
    for name, tensor in merged.items():
        assert torch.equal(tensor, exact[name].float().to(torch.bfloat16)), name


def test_unmapped_state_is_the_same_function() -> None:
    """The merged weights become the base, and the adapters add nothing."""
    program = after(learned(), "merge_lora")
    state = program.state_maps[-1].unmap_state(program.weights)
    assert state.keys() == learned().weights.keys()
    assert not any(tensor.any() for name, tensor in state.items() if ".lora_B." in name)
    given = inputs(program, "forward")
    unmerged = with_weights(learned(), state)
    assert same(run(unmerged, "forward", given), run(program, "forward", given))
    assert same(program.state_maps[-1].map_state(state), program.weights)


def test_needs_lora() -> None:
    assert refused(after, reached("score", *CANONICAL), "merge_lora") == (
        "merge_lora: there are no adapters; put lora before it in the recipe"
    )


def test_adapters_that_are_gone_are_refused() -> None:
    """The log says lora, the graph holds none of it."""
    bare = replace(reached("score", *CANONICAL), facts=learned().facts)
    message = refused(after, bare, "merge_lora")
    assert message.startswith("merge_lora: matched nothing: the graphs hold no candidate for it")
