"""lora: PEFT's adapters, in names, initial values and results."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers import (
    CANONICAL,
    PASSES,
    after,
    captured,
    difference,
    hand_made,
    inputs,
    make_program,
    make_recipe,
    randomise,
    reached,
    refused,
    run,
    same,
    text,
    tiny_config,
)
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from lltk.compiler import with_weights
from lltk.graph.facts import Trainable
from lltk.graph.geometry import Kind
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.passes import make_pass
from lltk.passes.lora import is_adapter

pytestmark = pytest.mark.cpu

BEFORE = """
    def score(hidden_states: latents(f32[1, 4, 3])):
        # blocks.0.ffn.net.2
        linear: f32[1, 4, 3] = aten.linear.default(hidden_states, \
self['blocks.0.ffn.net.2.weight'], self['blocks.0.ffn.net.2.bias'])
        # blocks.0.norm2
        neg: f32[1, 4, 3] = aten.neg.default(linear)
        # proj_out
        linear_1: f32[1, 4, 3] = aten.linear.default(neg, self['proj_out.weight'])
        return {'sample': linear_1}
"""
AFTER = """
def score(hidden_states: latents(f32[1, 4, 3])):
    # blocks.0.ffn.net.2
    linear: f32[1, 4, 3] = aten.linear.default(hidden_states, \
self['blocks.0.ffn.net.2.weight'], self['blocks.0.ffn.net.2.bias'])
    linear_2: f32[1, 4, 2] = aten.linear.default(hidden_states, \
self['blocks.0.ffn.net.2.lora_A.weight'])
    linear_3: f32[1, 4, 3] = aten.linear.default(linear_2, \
self['blocks.0.ffn.net.2.lora_B.weight'])
    mul: f32[1, 4, 3] = aten.mul.Tensor(linear_3, 4.0)
    add: f32[1, 4, 3] = aten.add.Tensor(linear, mul)
    # blocks.0.norm2
    neg: f32[1, 4, 3] = aten.neg.default(add)
    # proj_out
    linear_1: f32[1, 4, 3] = aten.linear.default(neg, self['proj_out.weight'])
    return {'sample': linear_1}
"""
SMALL = {"rank": 2, "alpha": 8.0}
WEIGHTS = {
    "blocks.0.ffn.net.2.weight": torch.ones(3, 3),
    "blocks.0.ffn.net.2.bias": torch.ones(3),
    "proj_out.weight": torch.ones(3, 3),
}


def made() -> Program:
    return hand_made("score", Stage.CAUSAL, {"score": BEFORE}, WEIGHTS)


def adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if is_adapter(name)}


def adapted(*steps: str, kind: Kind = "score", **options: Any) -> Program:
    return after(reached(kind, *steps), {"lora": SMALL | options})


def test_rewrites_the_text() -> None:
    program = after(made(), {"lora": SMALL})
    assert text(program, "score") == AFTER.strip()
    assert list(program.weights) == [
        *WEIGHTS,
        "blocks.0.ffn.net.2.lora_A.weight",
        "blocks.0.ffn.net.2.lora_B.weight",
    ]


@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int) -> None:
    """A block has ten linears.

    The commit's last block keeps two, and the prologue has two a block.
    """
    score = after(reached("score", *CANONICAL, layers=layers), {"lora": SMALL})
    assert score.log[-1].matches == {"linears": 10 * layers}
    stream = after(reached("stream", *PASSES["stream"][:6], layers=layers), {"lora": SMALL})
    assert stream.log[-1].matches == {"linears": 2 * layers + 8 * layers + 8 * (layers - 1) + 2}
    assert adapters(stream.weights).keys() == adapters(score.weights).keys()
    assert len(adapters(score.weights)) == 20 * layers


def test_initial_adapters_keep_every_bit() -> None:
    before, program = reached("score", *CANONICAL), adapted(*CANONICAL)
    given = inputs(before, "forward")
    wanted = run(before, "forward", given)
    assert same(run(program, "forward", given), wanted)
    learned = with_weights(program, program.weights | randomise(adapters(program.weights)))
    assert difference(run(learned, "forward", given), wanted) > 0.01


def test_only_adapters_train() -> None:
    program = adapted(*CANONICAL)
    trains = {n for n, p in instantiate(program).named_parameters() if p.requires_grad}
    assert trains == program.fact(Trainable).names == adapters(program.weights).keys()


def test_initial_values_are_pefts() -> None:
    """Kaiming uniform with a = √5 is uniform within 1/√in."""
    program = adapted(*CANONICAL, rank=64)
    for name, tensor in adapters(program.weights).items():
        if ".lora_B." in name:
            assert not tensor.any()
            continue
        bound = tensor.shape[1] ** -0.5
        reference = nn.init.kaiming_uniform_(torch.empty_like(tensor), a=5**0.5)
        assert 0.97 * bound < tensor.abs().max() <= bound
        assert 0.97 * bound < reference.abs().max() <= bound
        assert abs(float(tensor.mean())) < 0.1 * bound


def test_initial_values_follow_from_the_seed() -> None:
    first, again, other = (adapted(*CANONICAL, seed=s).weights for s in (3, 3, 4))
    assert same(first, again) and not same(adapters(first), adapters(other))


def test_initial_values_do_not_depend_on_the_order_of_a_file() -> None:
    """safetensors files are sorted by name, models are not."""
    program, state = adapted(*CANONICAL), captured("score").weights
    assert same(program.map_state(dict(sorted(state.items()))), program.map_state(state))


@pytest.fixture(scope="module")
def peft_model() -> nn.Module:
    """diffusers' model with PEFT's adapters at random values, on the captured weights."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**tiny_config())
    model.load_state_dict(captured("score").weights)
    linears = r"blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"
    wrapped = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=8, target_modules=linears, init_lora_weights=False)
    )
    return wrapped.eval()


def peft_adapters(model: nn.Module) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model)
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


def test_names_and_shapes_are_pefts(peft_model: nn.Module) -> None:
    ours, theirs = adapters(adapted(*CANONICAL).weights), peft_adapters(peft_model)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


@torch.no_grad()
def test_outputs_are_pefts(peft_model: nn.Module) -> None:
    given = inputs(reached("score", "canonicalise"), "forward")
    wanted = {"sample": peft_model(**given, return_dict=False)[0]}
    learned = captured("score").weights | peft_adapters(peft_model)

    def off_by(**options: Any) -> float:
        program = with_weights(adapted("canonicalise", **options), learned)
        return difference(run(program, "forward", given), wanted)

    assert off_by() < 1e-5
    assert off_by(alpha=4.0) > 0.01


# State dicts


def test_given_adapters_are_kept() -> None:
    """Adapters that come with the captured weights, as from an adapter file."""
    before = reached("score", *CANONICAL)
    given = randomise(adapters(adapted(*CANONICAL).weights), seed=5)
    program = after(replace(before, weights=before.weights | given), {"lora": SMALL})
    assert same(adapters(program.weights), given)


def test_adapters_of_another_rank_are_refused() -> None:
    before = reached("score", *CANONICAL)
    given = before.weights | adapters(adapted(*CANONICAL, rank=3).weights)
    assert refused(after, replace(before, weights=given), {"lora": SMALL}) == (
        "lora: 40 of the given adapters do not fit rank=2 and include: "
        "blocks.0.attn1.to_k.lora_A.weight is (3, 24), wanted (2, 24); "
        "set lora.rank and lora.include to the file's"
    )


def test_state_dicts_drop_what_adapters_learned() -> None:
    program = adapted(*CANONICAL)
    learned = randomise(program.weights, seed=6)
    base = program.unmap_state(learned)
    assert base.keys() == captured("score").weights.keys()
    assert all(torch.equal(base[name], learned[name]) for name in base)


def test_adapters_have_their_weights_dtype() -> None:
    state = {name: t.to(torch.bfloat16) for name, t in captured("score").weights.items()}
    mapped = adapted(*CANONICAL).map_state(state)
    assert {tensor.dtype for tensor in mapped.values()} == {torch.bfloat16}


def test_a_program_without_weights_gets_adapters_with_them() -> None:
    recipe = make_recipe("score", [*CANONICAL, {"lora": SMALL}], layers=1)
    program = make_program(recipe, seed=None)
    assert all(tensor.is_meta for tensor in program.weights.values())
    loaded = with_weights(program, captured("score", layers=1).weights)
    wanted = after(reached("score", *CANONICAL, layers=1), {"lora": SMALL})
    assert same(loaded.weights, wanted.weights)


# Which modules


def test_include_chooses_the_modules() -> None:
    program = adapted(*CANONICAL, include=r"blocks\.1\.attn1\.to_[qv]")
    assert sorted(adapters(program.weights)) == [
        f"blocks.1.attn1.to_{part}.lora_{side}.weight" for part in "qv" for side in "AB"
    ]
    assert program.log[-1].matches == {"linears": 2}


@pytest.mark.parametrize("include", [r"blocks\.0\..*", r".*"])
def test_a_wide_include_adapts_linears_only(include: str) -> None:
    """Norms and the patch embedding match the pattern too, but hold no linear."""
    program = adapted(*CANONICAL, include=include)
    modules = {name.rpartition(".lora_")[0] for name in adapters(program.weights)}
    assert len(modules) == program.log[-1].matches["linears"]
    assert not {module for module in modules if re.search(r"norm|patch_embedding", module)}


def test_include_that_matches_nothing_names_what_there_is() -> None:
    assert refused(after, made(), {"lora": {"include": r"blocks\.0\.attn1.*"}}).startswith(
        "lora: matched nothing: linear (blocks.0.ffn.net.2): blocks.0.ffn.net.2 does not match "
        "include='blocks\\\\.0\\\\.attn1.*'; linear_1 (proj_out): proj_out does not match"
    )


def test_include_that_is_no_pattern_is_refused() -> None:
    assert "include" in refused(make_pass, "lora", {"include": "blocks.(0"})


def test_second_adapter_on_one_linear_is_refused() -> None:
    """It would share the first one's parameters and count them twice."""
    message = refused(after, made(), {"lora": SMALL}, {"lora": SMALL})
    assert message.startswith("lora: has run already (passes so far: lora)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnak": 4}, "passes: lora: unknown key 'rnak'; did you mean 'rank'?"),
        ({"rank": 0}, "passes: lora: rank: Input should be greater than or equal to 1"),
        ({"alpha": 0}, "passes: lora: alpha: Input should be greater than 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    assert refused(make_pass, "lora", options) == message
