"""nvfp4_train: linears and their gradients as products of NVFP4 operands."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CANONICAL,
    after,
    clips,
    hand_made,
    make_program,
    make_recipe,
    refused,
    text,
    texts,
    tiny_config,
)
from torch import Tensor, fx

from lltk.graph.joint import joint_graph
from lltk.graph.memory import estimate
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.graph.text import print_graph
from lltk.ops.hadamard.reference import SIGNS, hadamard, random_signs
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_quantise import reference as nvfp4_reference
from lltk.ops.nvfp4_quantise.reference import nvfp4_quantise
from lltk.ops.philox import uniform
from lltk.train.data import Batch
from lltk.train.flow_matching import FlowMatching
from lltk.train.loop import METRICS, Trainer
from lltk.train.metrics import read_metrics
from lltk.train.recipe import TrainSection

pytestmark = pytest.mark.cpu

BEFORE = """
    def train(hidden_states: latents(f32[1, 20, 16])):
        # blocks.0.norm1
        neg: f32[1, 20, 16] = aten.neg.default(hidden_states)
        # blocks.0.attn1.to_q
        linear: f32[1, 20, 32] = aten.linear.default(neg, self['blocks.0.attn1.to_q.weight'], \
self['blocks.0.attn1.to_q.bias'])
        # blocks.0.attn1.to_k
        linear_1: f32[1, 20, 32] = aten.linear.default(neg, self['blocks.0.attn1.to_k.weight'])
        # root
        add: f32[1, 20, 32] = aten.add.Tensor(linear, linear_1)
        linear_2: f32[1, 20, 3] = aten.linear.default(add, self['proj_out.weight'])
        return {'sample': linear_2}
"""
WEIGHTS = {
    "blocks.0.attn1.to_q.weight": torch.ones(32, 16),
    "blocks.0.attn1.to_q.bias": torch.ones(32),
    "blocks.0.attn1.to_k.weight": torch.ones(32, 16),
    "proj_out.weight": torch.ones(3, 32),
}
SIGNS_TEXT = str(list(SIGNS))
AFTER = f"""
    # blocks.0.attn1.to_q
    nvfp4_linear: f32[1, 20, 32] = lltk.nvfp4_linear.default(neg, \
self['blocks.0.attn1.to_q.weight'], getitem, getitem_1, getitem_2, getitem_3, getitem_4, \
getitem_5, attn1_to_q_codes_0, attn1_to_q_scales_0, attn1_to_q_scale_0, attn1_to_q_codes_t_0, \
attn1_to_q_scales_t_0, random_0, 0, True, 'mse', {SIGNS_TEXT})
    add_1: f32[1, 20, 32] = aten.add.Tensor(nvfp4_linear, self['blocks.0.attn1.to_q.bias'])
    # blocks.0.attn1.to_k
    nvfp4_linear_1: f32[1, 20, 32] = lltk.nvfp4_linear.default(neg, \
self['blocks.0.attn1.to_k.weight'], getitem, getitem_1, getitem_2, getitem_3, getitem_4, \
getitem_5, attn1_to_k_codes_0, attn1_to_k_scales_0, attn1_to_k_scale_0, attn1_to_k_codes_t_0, \
attn1_to_k_scales_t_0, random_0, 2, True, 'mse', {SIGNS_TEXT})
"""
OPERANDS = """
    detach: f32[1, 20, 16] = aten.detach.default(neg)
    nvfp4_quantise: (u8[1, 20, 8], f8e4m3[1, 20, 1], f32[()],) = \
lltk.nvfp4_quantise.default(detach, 1, 'none')
"""
TURNED = f"""
    nvfp4_quantise_transposed: (u8[16, 16], f8e4m3[16, 2], f32[()],) = \
lltk.nvfp4_quantise_transposed.default(detach, {SIGNS_TEXT}, 'none')
"""
QUANTISED = """
    # blocks.0.attn1.to_q
    nvfp4_quantise: (u8[32, 8], f8e4m3[32, 1], f32[()],) = \
lltk.nvfp4_quantise.default(self['blocks.0.attn1.to_q.weight'], 16, 'none')
"""
STEPS = (*CANONICAL, "text_per_chunk", "teacher_forcing")
WIDE: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48}


def made() -> Program:
    program = hand_made("train", Stage.CAUSAL, {"train": BEFORE}, WEIGHTS)
    return program


def trained(layers: int = 2, *more: str, **options: Any) -> Program:
    """A tiny train program, its blocks' linears in NVFP4."""
    steps = [*STEPS, {"nvfp4_train": options}, *more]
    config = tiny_config(layers, **WIDE)
    return make_program(make_recipe("train", steps, layers=layers, config=config))


def test_rewrites_the_text() -> None:
    program = after(made(), "nvfp4_train")
    printed = text(program, "train")
    for part in (AFTER, OPERANDS, TURNED):
        assert part.strip("\n") in printed
    assert printed.count("lltk.nvfp4_quantise") == 2, "both linears read the same operands"
    assert "aten.linear.default(add, self['proj_out.weight'])" in printed
    assert QUANTISED.strip() in text(program, "weights")
    assert program.contract("weights").outputs.keys() < program.contract("train").inputs.keys()
    (entry,) = program.log
    assert entry.matches == {"attn1.to_q": 1, "attn1.to_k": 1}
    assert entry.kept == {"not among include": ["proj_out"]}


def test_a_blocks_joint_graph_shows_every_operand() -> None:
    program = trained(1, "regionalise", "lower")
    (region,) = [r for name, r in program.regions.items() if name.startswith("train")]
    graph = joint_graph(region)
    printed = print_graph(graph, "joint")
    for part in ("'grad_attn1_to_q_weight': nvfp4_matmul", "lltk.nvfp4_linear", "grad_0: f32["):
        assert part in printed
    linears, products = (printed.count(f"lltk.nvfp4_{op}.") for op in ("linear", "matmul"))
    assert products == 2 * linears > 0, "dx and dW of each"
    generator = torch.Generator().manual_seed(0)
    given = []
    for node in region.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        drawn = torch.rand(value.shape, generator=generator)
        drawn = drawn.to(value.dtype) if value.dtype.itemsize < 8 else torch.ones_like(drawn).long()
        given.append(drawn.requires_grad_(value.dtype == torch.float32))
    module = torch.nn.Module()
    (result,) = fx.GraphModule(module, region.graph)(*given)
    read = [t for t in given if t.requires_grad]
    grads = torch.autograd.grad(result, read, result.detach(), allow_unused=True)
    graph.output_node().args = (list(graph.output_node().args[0].values()),)
    with torch.no_grad():
        found = fx.GraphModule(module, graph)(*given, result.detach())
    wanted = [result.detach(), *(grad for grad in grads if grad is not None)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm())
    assert sum(bool(each.any()) for each in wanted) >= linears


def test_what_is_not_asked_for_is_not_in_the_text() -> None:
    program = after(made(), {"nvfp4_train": {"hadamard": 0, "stochastic": False}})
    assert "lltk.nvfp4_quantise_transposed.default(detach, [], 'none')" in text(program, "train")
    assert "random_0, 0, False, 'mse', [])" in text(program, "train")


@pytest.mark.parametrize(
    ("options", "signs"),
    [
        ({}, list(SIGNS)),
        ({"hadamard_seed": 0}, random_signs(16, 0)),
        ({"hadamard_seed": 3}, random_signs(16, 3)),
        ({"hadamard": 32}, random_signs(32, 0)),
        ({"hadamard": 32, "hadamard_seed": 3}, random_signs(32, 3)),
    ],
    ids=str,
)
def test_the_signs_follow_from_width_and_seed(options: dict[str, int], signs: list[int]) -> None:
    """The operand of x has them, and so has each of the two linears that read x."""
    printed = text(after(made(), {"nvfp4_train": options}), "train")
    assert printed.count(str(signs)) == 3


@pytest.mark.parametrize("layers", [1, 3])
def test_matches_follow_from_the_layers(layers: int) -> None:
    program = trained(layers)
    assert set(program.log[-1].matches.values()) == {layers}
    assert len(program.log[-1].matches) == 10
    assert len(program.contract("weights").outputs) == 50 * layers


def test_memory_counts_the_weights_values() -> None:
    """A value takes 4.5 bits, and the transpose as much again."""
    program = trained(2)
    linears = [t for n, t in program.weights.items() if n.startswith("blocks") and t.dim() == 2]
    extra = sum(2 * t.numel() * 9 // 16 + 4 for t in linears)
    plain = estimate(high_precision())
    assert estimate(program) == plain | {"quantised weights": extra}


def test_layers_share_a_region() -> None:
    program = trained(3, "regionalise", "lower")
    assert set(program.regions) == {"train_block", "weights_block"}
    quantised = {op: name for op, name in program.implementations.items() if "nvfp4" in op}
    assert quantised == dict.fromkeys(
        ("nvfp4_quantise", "nvfp4_quantise_transposed", "nvfp4_transpose", "nvfp4_linear"),
        "reference",
    )
    kernels = trained(3, "regionalise", {"lower": {"prefer": ["te", "triton"]}})
    assert {op: kernels.implementations[op] for op in quantised} == dict.fromkeys(
        quantised, "triton"
    ) | {"nvfp4_linear": "te"}
    calls = [line for line in texts(kernels)["train_block"].splitlines() if "lltk.nvfp4" in line]
    assert all("_triton.default(" in line or "linear_te.default(" in line for line in calls)
    assert any("lltk.nvfp4_linear_te.default(" in line for line in calls)


def test_what_is_kept_is_told() -> None:
    program = trained(4, exclude=[r"blocks\.0\..*", r".*\.ffn\.net\.2"], keep_last=0.5)
    kept = program.log[-1].kept
    assert len(kept[r"excluded by 'blocks\\.0\\..*'"]) == 10
    assert kept[r"excluded by '.*\\.ffn\\.net\\.2'"] == [f"blocks.{i}.ffn.net.2" for i in (1, 2, 3)]
    assert len(kept["in the last 50% of the blocks"]) == 18
    assert sum(program.log[-1].matches.values()) == 9


def test_odd_widths() -> None:
    ragged = BEFORE.replace("16]", "24]")
    weights = {
        n: torch.ones(32, 24) if "to_" in n and "weight" in n else w for n, w in WEIGHTS.items()
    }
    program = hand_made("train", Stage.CAUSAL, {"train": ragged}, weights)
    message = refused(after, program, "nvfp4_train")
    assert "blocks.0.attn1.to_q: in 24 features are not a multiple of 16" in message
    assert "ragged=pad" in message
    padded = after(program, {"nvfp4_train": {"ragged": "pad"}})
    given = {"hidden_states": torch.randn(1, 20, 24)}
    module = instantiate(padded)
    more = {"random": torch.tensor([0, 0]), **module.quantised_weights()}
    wanted = instantiate(program)("train", dict(given))["sample"]
    error = (module("train", given | more)["sample"] - wanted).norm() / wanted.norm()
    assert float(error.detach()) < 0.2


def test_a_bad_pattern_is_named() -> None:
    assert "exclude: '(' is not a regular expression" in refused(trained, 1, exclude=["("])


def test_matching_nothing_is_an_error() -> None:
    message = refused(after, made(), {"nvfp4_train": {"include": "nothing"}})
    assert "matched nothing" in message and "not among include" in message


# Numbers


def quantised(x: Tensor, tile: int = 1, rule: str = "none") -> Tensor:
    return nvfp4_dequantise(*nvfp4_quantise(x, tile, rule))[..., : x.shape[-1]]


class ByHand(torch.autograd.Function):
    """A linear in NVFP4, its formulas over decoded operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return quantised(x) @ quantised(weight, 16).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors

        def operand(t: Tensor, rule: str) -> Tensor:
            rows = t.flatten(0, -2)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % 16))
            return quantised(hadamard(rows.t().contiguous(), list(SIGNS)), rule=rule)

        dx = quantised(grad, rule="mse") @ quantised(weight, 16)
        return dx, operand(grad, "mse") @ operand(x, "none").t()


def gradients(program: Program) -> tuple[Tensor, dict[str, Tensor]]:
    """A call's loss and every parameter's gradient."""
    module = instantiate(program)
    loss = FlowMatching(program, module).loss(clips(program))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def oracle(program: Program) -> Program:
    """The high-precision program with its blocks' linears done by hand."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = ByHand.apply(x, weight)
        return y if bias is None else y + bias

    program = after(program)
    target = torch.ops.aten.linear.default
    for name, graph in program.every_graph():
        for node in graph.find_nodes(op="call_function", target=target):
            if "block" in name:
                node.target = linear
    return program


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in ours)


def high_precision(layers: int = 2) -> Program:
    steps = [*STEPS, "regionalise", "lower"]
    return make_program(make_recipe("train", steps, config=tiny_config(layers, **WIDE)))


def test_the_loss_and_every_gradient_are_those_of_the_formulas() -> None:
    ours, grads = gradients(trained(2, "regionalise", "lower", stochastic=False))
    wanted, wanted_grads = gradients(oracle(high_precision()))
    assert float(ours) == pytest.approx(float(wanted), rel=1e-5)
    assert distance(grads, wanted_grads) < 1e-3
    plain = gradients(high_precision())[1]
    assert distance(grads, plain) > 0.05, "NVFP4 differs from high precision"
    other = gradients(trained(2, "regionalise", "lower", stochastic=False, hadamard=0))[1]
    assert distance(other, wanted_grads) > 0.01, "the transform is part of the formulas"


def test_every_gradient_flows_in_any_setting() -> None:
    for options in ({}, {"hadamard": 0}, {"hadamard": 32}, {"stochastic": False}):
        _, grads = gradients(trained(1, "regionalise", "lower", **options))
        assert grads.keys() == gradients(high_precision(1))[1].keys()
        assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads.values()), options


def test_draws_follow_the_batch() -> None:
    program = trained(2, "regionalise", "lower")
    first, again = gradients(program)[1], gradients(program)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    module = instantiate(program)
    objective, batch = FlowMatching(program, module), clips(program)
    later = Batch(batch.seed, range(5, 5 + len(batch.indices)), batch.tensors)
    for each, drawn in ((batch, [7, 0]), (later, [7, 5])):
        inputs, *_ = objective._prepared(objective._excerpt(each))
        assert inputs["random"].tolist() == drawn


def test_no_two_operands_share_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither within a linear (dx and dW), nor over two linears or two layers."""
    drawn: list[tuple[int, ...]] = []

    def recorded(seed: Tensor, stream: int, shape: tuple[int, ...], run: int) -> Tensor:
        drawn.append((*seed.tolist(), stream))
        return uniform(seed, stream, shape)

    monkeypatch.setattr(nvfp4_reference, "uniform", recorded)
    program = trained(2, "regionalise", "lower", include=".*", ragged="pad")
    gradients(program)
    linears = sum(program.log[-3].matches.values())
    assert linears > 2 * 10, "some belong to no layer"
    assert 2 * linears - 3 <= len(drawn) <= 2 * linears, "but what no gradient flows to"
    assert len(set(drawn)) == len(drawn)


def test_weights_are_quantised_once_a_change() -> None:
    """The loss reads what was quantised last, not the weights themselves."""
    program = trained(1, "regionalise", "lower")
    module = instantiate(program)
    objective, batch = FlowMatching(program, module), clips(program)
    before = objective.loss(batch)
    with torch.no_grad():
        module.get_parameter("blocks.0.ffn.net.2.weight").mul_(-2)
    assert torch.equal(objective.loss(batch), before)
    objective.weights_changed()
    assert not torch.equal(objective.loss(batch), before)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    program = trained(2, "regionalise", "lower")
    wanted = gradients(program)[1]
    module = instantiate(program)
    module.recompute_blocks()
    FlowMatching(program, module).loss(clips(program)).backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, wanted[name])


def test_states_are_those_before() -> None:
    program = trained(1)
    assert program.map_state(program.weights).keys() == high_precision(1).weights.keys()


def test_a_value_that_is_not_finite_is_traced_to_its_layer() -> None:
    program = trained(2, "regionalise", "lower")
    program.weights["blocks.1.ffn.net.2.weight"][0, 0] = torch.nan
    module = instantiate(program)
    where = FlowMatching(program, module).first_bad(clips(program))
    assert where is not None and "ffn_net_2_scale_1" in where


class Clips:
    """Endless random clips for a program."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def batch(self, seed: int, indices: range) -> Mapping[str, Tensor]:
        one = [clips(self.program, seed=seed + index).tensors for index in indices]
        return {name: torch.cat([each[name] for each in one]) for name in one[0]}


def losses(program: Program, folder: Path, steps: int, resume: bool = False) -> list[float]:
    """The losses of all steps so far of a folder's run."""
    section = TrainSection(steps=steps, lr=1e-3, checkpoint_every=2, ema_start=1, seed=5)
    about = {"recipe": {"train": section.model_dump(mode="json")}, "log": [], "versions": {}}
    objective = FlowMatching(program, instantiate(program))
    deque(Trainer(objective, Clips(program), section, folder, about, resume=resume), maxlen=0)
    return [metrics.loss for metrics in read_metrics(folder / METRICS)]


def test_a_resumed_run_draws_the_same(tmp_path: Path) -> None:
    """Weights are quantised anew from the training state, and rounding draws what it would have."""
    program = trained(1, "regionalise", "lower")
    whole = losses(program, tmp_path / "whole", 4)
    losses(program, tmp_path / "parts", 2)
    assert losses(program, tmp_path / "parts", 4, resume=True) == whole
    assert len(whole) == 4 and len(set(whole)) == 4
    plain = trained(1, "regionalise", "lower", stochastic=False)
    other = losses(plain, tmp_path / "plain", 4)
    assert other[0] == whole[0] and other[1:] != whole[1:], "gradients are what is drawn"
