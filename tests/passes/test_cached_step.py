"""cached_step: a chunk attends to itself and to the pages it is given."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CANONICAL,
    after,
    chunk_mask,
    difference,
    exposing,
    hand_made,
    inputs,
    masked,
    reached,
    refused,
    run,
    text,
)
from torch import Tensor

from lltk.graph.attention import find_attention
from lltk.graph.passes import Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage

pytestmark = pytest.mark.cpu

PROLOGUE = """
    def prologue(encoder_hidden_states: text(f32[1, 8, 2, 3])):
        # root
        neg: f32[1, 8, 2, 3] = aten.neg.default(encoder_hidden_states)
        return {'cross_k_0': neg}
"""
BEFORE = """
    def step(q: f32[1, 8, 2, 3], k: f32[1, 8, 2, 3], v: f32[1, 8, 2, 3]):
        # blocks.0.attn1
        permute: f32[1, 2, 8, 3] = aten.permute.default(q, [0, 2, 1, 3])
        permute_1: f32[1, 2, 8, 3] = aten.permute.default(k, [0, 2, 1, 3])
        permute_2: f32[1, 2, 8, 3] = aten.permute.default(v, [0, 2, 1, 3])
        sdpa: f32[1, 2, 8, 3] = \
aten.scaled_dot_product_attention.default(permute, permute_1, permute_2)
        permute_3: f32[1, 8, 2, 3] = aten.permute.default(sdpa, [0, 2, 1, 3])
        return {'sample': permute_3}
"""
AFTER = """
def step(q: f32[1, 8, 2, 3], k: f32[1, 8, 2, 3], v: f32[1, 8, 2, 3], table: table(i64[3]), \
k_pages_0: pages(f32[1, 4, 8, 2, 3]), v_pages_0: pages(f32[1, 4, 8, 2, 3])):
    # blocks.0.attn1
    paged_attention: f32[1, 8, 2, 3] = \
lltk.paged_attention.default(q, k, v, k_pages_0, v_pages_0, table)
    return {'sample': paged_attention}
"""
STEPS = (*CANONICAL, "hoist_text", "cached_step")


def made(step: str) -> Program:
    return hand_made("stream", Stage.CANONICAL, {"prologue": PROLOGUE, "step": step})


def test_rewrites_the_text() -> None:
    program = after(made(BEFORE), "cached_step")
    assert text(program, "step") == AFTER.strip()
    assert text(program, "prologue") == text(made(BEFORE), "prologue")


@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int) -> None:
    program = reached("stream", *STEPS, layers=layers)
    assert program.log[-1].matches == {"self-attention": layers}
    specs = program.contract("step").inputs
    pages = [f"{part}_pages_{layer}" for layer in range(layers) for part in "kv"]
    assert list(specs)[-len(pages) - 1 :] == ["table", *pages]
    assert specs["table"].shape == (3,) and specs["table"].dtype == torch.int64
    assert {specs[name].shape for name in pages} == {(1, 4, 8, 2, 12)}


class OneShot:
    """Three chunks through the canonical graph at once, each masked to itself and the past."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        dense = reached("score", *CANONICAL)
        template = dense.spec.self_attention
        program = masked(dense, template, chunk_mask([[0], [0, 1], [0, 1, 2]], 8))
        kept = {}
        for attention in find_attention(dense, dense.graphs["forward"], template, Report()):
            kept[f"k_{attention.layer}"] = attention.k.name
            kept[f"v_{attention.layer}"] = attention.v.name
        self.dtype = dtype
        self.given = inputs(program, "forward")
        self.result = run(exposing(program, "forward", kept), "forward", self.given, dtype)

    def step_inputs(
        self, program: Program, table: list[int], slots: list[int]
    ) -> dict[str, Tensor]:
        """The last chunk's inputs, with the first two chunks' K/V in the pages ``slots``."""
        given = {
            "hidden_states": self.given["hidden_states"][:, :, 4:],
            "timestep": self.given["timestep"][:, 4:],
            "positions": self.given["positions"][4:],
            "table": torch.tensor(table, dtype=torch.int64),
        }
        for name, spec in program.contract("step").inputs.items():
            part, _, layer = name.partition("_pages_")
            if layer:
                given[name] = torch.full(spec.shape, 1e3, dtype=self.result["sample"].dtype)
                values = self.result[f"{part}_{layer}"].unflatten(1, (3, 8))
                for chunk, slot in enumerate(slots):
                    given[name][:, slot] = values[:, chunk]
        prompt = {"encoder_hidden_states": self.given["encoder_hidden_states"]}
        return given | run(program, "prologue", prompt, self.dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-5), (torch.float64, 1e-13)])
def test_outputs_agree_with_a_masked_one_shot(dtype: torch.dtype | None, bound: float) -> None:
    oracle, program = OneShot(dtype), reached("stream", *STEPS)
    wanted = {"sample": oracle.result["sample"][:, :, 4:]}

    def off_by(table: list[int], slots: list[int], **changes: Tensor) -> float:
        given = oracle.step_inputs(program, table, slots) | changes
        return difference(run(program, "step", given, dtype), wanted)

    assert off_by([0, 1], [0, 1]) < bound
    assert off_by([3, 1], [1, 3]) < bound
    assert off_by([0], [0, 1]) > 0.01
    assert off_by([], [0, 1]) > 0.01
    assert off_by([0, 1, 2], [0, 1]) > 0.01
    assert off_by([0, 1], [0, 1], positions=oracle.given["positions"][:2]) > 0.001


def test_without_pages_the_step_is_the_dense_one() -> None:
    before, program = reached("stream", *STEPS[:-1]), reached("stream", *STEPS)
    given = inputs(program, "step") | {"table": torch.empty(0, dtype=torch.int64)}
    dense = {name: given[name] for name in before.contract("step").inputs}
    assert difference(run(program, "step", given), run(before, "step", dense)) < 1e-5


def test_needs_the_step() -> None:
    assert refused(after, reached("stream", *CANONICAL), "cached_step") == (
        "cached_step: there is no step graph; put hoist_text before it in the recipe"
    )


def test_attention_that_does_not_fit_is_named() -> None:
    masked_already = BEFORE.replace("permute_1, permute_2)", "permute_1, permute_2, None, 0.5)")
    assert refused(after, made(masked_already), "cached_step").startswith(
        "cached_step: matched nothing: sdpa (blocks.0.attn1): has a mask, dropout or scale"
    )
