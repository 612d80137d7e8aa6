"""fp8_infer: weights packed by rows, activations quantised as they come."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PASSES,
    Steps,
    after,
    difference,
    hand_made,
    inputs,
    make_program,
    make_recipe,
    randomise,
    reexported,
    refused,
    run,
    same,
    text,
    texts,
    tiny_config,
)
from torch import Tensor

from lltk.artefact import load_program, save_program
from lltk.compiler import with_weights
from lltk.graph.contract import TensorSpec
from lltk.graph.fingerprint import fingerprint
from lltk.graph.geometry import Kind
from lltk.graph.memory import estimate
from lltk.graph.module import instantiate
from lltk.graph.packed import check_fp8_weights
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.fp8_rows import fp8_quantise
from lltk.stream.rollout import Rollout

pytestmark = pytest.mark.cpu

BEFORE = """
    def step(hidden_states: latents(f32[1, 4, 16])):
        # blocks.0.attn1.to_q
        linear: f32[1, 4, 32] = aten.linear.default(hidden_states, \
self['blocks.0.attn1.to_q.weight'], self['blocks.0.attn1.to_q.bias'])
        # blocks.0.attn1.to_k
        linear_1: f32[1, 4, 32] = aten.linear.default(hidden_states, \
self['blocks.0.attn1.to_k.weight'])
        # root
        add: f32[1, 4, 32] = aten.add.Tensor(linear, linear_1)
        return {'sample': add}
"""
AFTER = """
def step(hidden_states: latents(f32[1, 4, 16])):
    # root
    row_pipeline: (f8e4m3[1, 4, 16], f32[1, 4, 1],) = \
lltk.row_pipeline.default(hidden_states, to='fp8')
    getitem: f8e4m3[1, 4, 16] = getitem(row_pipeline, 0)
    getitem_1: f32[1, 4, 1] = getitem(row_pipeline, 1)
    # blocks.0.attn1.to_q
    fp8_matmul: f32[1, 4, 32] = lltk.fp8_matmul.default(getitem, getitem_1, \
self['blocks.0.attn1.to_q.weight_values'], self['blocks.0.attn1.to_q.weight_row_scales'], \
self['blocks.0.attn1.to_q.bias'], torch.float32)
    # blocks.0.attn1.to_k
    fp8_matmul_1: f32[1, 4, 32] = lltk.fp8_matmul.default(getitem, getitem_1, \
self['blocks.0.attn1.to_k.weight_values'], self['blocks.0.attn1.to_k.weight_row_scales'], \
None, torch.float32)
    # root
    add: f32[1, 4, 32] = aten.add.Tensor(fp8_matmul, fp8_matmul_1)
    return {'sample': add}
"""
MODULES = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "blocks.0.attn1.to_q.weight": normal(32, 16),
    "blocks.0.attn1.to_q.bias": torch.ones(32),
    "blocks.0.attn1.to_k.weight": normal(32, 16, seed=1),
}
STEPS = PASSES["stream"][:6]
WIDE = {"attention_head_dim": 16}
NAME = "blocks.1.ffn.net.2.weight"
LINEARS = {
    f"blocks.{layer}.{kind}"
    for layer in range(2)
    for kind in (
        *(f"attn{n}.to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out.0")),
        "ffn.net.0.proj",
        "ffn.net.2",
    )
}


def made(
    weights: dict[str, Tensor] = WEIGHTS, kind: Kind = "stream", graph: str = BEFORE
) -> Program:
    names = ("prologue", "step", "commit") if kind == "stream" else (kind,)
    return hand_made(
        kind, Stage.CAUSAL, {name: graph.replace("step", name) for name in names}, weights
    )


def ragged() -> Program:
    """A graph of linears whose widths are 10 and 24."""
    graph = BEFORE.replace("4, 16]", "4, 10]").replace("4, 32]", "4, 24]")
    weights = {f"{m}.weight": normal(24, 10, seed=i) for i, m in enumerate(MODULES)}
    return made(weights | {f"{MODULES[0]}.bias": torch.ones(24)}, graph=graph)


@cache
def converted_by_hand() -> Program:
    """The graph above in W8A8; not to be changed."""
    return after(made(), "fp8_infer")


@cache
def causal() -> Program:
    """The stream that the pass reads.

    Its linears have widths that are multiples of 16. Not to be changed.
    """
    return make_program(make_recipe("stream", STEPS, config=tiny_config(2, **WIDE)))


@cache
def plain() -> Program:
    """The streaming program; not to be changed."""
    return after(causal(), "regionalise", "lower")


def converted(lower: dict[str, str] | None = None, **options: Any) -> Program:
    """The streaming program in W8A8, of the same weights."""
    return after(causal(), {"fp8_infer": options}, "regionalise", {"lower": lower or {}})


@cache
def quantised() -> Program:
    """The same with every block's linears quantised; not to be changed."""
    return converted()


@cache
def from_recipe() -> Program:
    """A recipe's program in bfloat16 without weights; not to be changed."""
    chosen = {"fp8_infer": {"exclude": [r".*attn2\.to_q"]}}
    steps: Steps = [*STEPS, chosen, "regionalise", "lower"]
    recipe = make_recipe("stream", steps, config=tiny_config(1, **WIDE), dtype="bfloat16")
    return make_program(recipe, None)


def loaded() -> tuple[Program, dict[str, Tensor]]:
    """That program with weights, and the weights as they were."""
    bare = from_recipe()
    state = randomise(bare.unmap_state(bare.weights))
    return with_weights(bare, state), state


def decoded(x: Tensor) -> Tensor:
    values, scales = fp8_quantise(x)
    return values.float() * scales


def packed(weight: Tensor, module: str) -> dict[str, Tensor]:
    values, scales = fp8_quantise(weight)
    return {f"{module}.weight_values": values, f"{module}.weight_row_scales": scales}


def test_rewrites_the_text() -> None:
    program = after(made(), "fp8_infer")
    assert text(program, "step") == AFTER.strip()
    assert program.log[-1].matches == {"attn1.to_q": 3, "attn1.to_k": 3}
    assert program.log[-1].kept == {}


def test_weights_are_packed_as_the_reference_does() -> None:
    program = after(made(), "fp8_infer")
    wanted = {"blocks.0.attn1.to_q.bias": WEIGHTS["blocks.0.attn1.to_q.bias"]}
    for module in MODULES:
        wanted |= packed(WEIGHTS[f"{module}.weight"], module)
    assert same(program.weights, wanted)
    name = "blocks.0.attn1.to_k.weight_values"
    assert program.weights[name].dtype == torch.float8_e4m3fn
    assert not same(program.weights, wanted | {name: wanted[name].t().reshape(32, 16)})


def test_states_map_both_ways() -> None:
    program = quantised()
    back = program.unmap_state(program.weights)
    assert back.keys() == plain().weights.keys()
    weight = plain().weights[NAME]
    assert torch.equal(back[NAME], decoded(weight)) and back[NAME].dtype == weight.dtype
    assert 0 < difference({NAME: back[NAME]}, {NAME: weight}) < 0.05
    assert same(with_weights(program, plain().weights).weights, program.weights)
    given = inputs(program, "step")
    other = plain().weights | {NAME: 2 * weight}
    result = run(program, "step", given)
    assert not same(run(with_weights(program, other), "step", given), result)


def test_packed_weights_are_taken_as_they_are() -> None:
    program, module = quantised(), NAME.removesuffix(".weight")
    given = inputs(program, "step")
    wanted = run(program, "step", given)
    assert same(program.map_state(program.weights), program.weights)
    assert same(run(with_weights(program, program.weights), "step", given), wanted)
    some = dict(plain().weights)
    some |= packed(some.pop(NAME), module)
    assert same(with_weights(program, some).weights, program.weights)
    some[f"{module}.weight_row_scales"] = some[f"{module}.weight_row_scales"] * 2
    assert not same(run(with_weights(program, some), "step", given), wanted)


def test_the_output_is_the_plain_graphs_over_decoded_operands() -> None:
    program = quantised()

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = decoded(x) @ decoded(weight).t()
        return y if bias is None else y + bias

    oracle = after(plain())
    for name, rewritten in oracle.every_graph():
        for node in rewritten.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            if "block" in name:
                node.target = linear
    for graph in ("prologue", "step", "commit"):
        given = inputs(program, graph)
        wanted = run(oracle, graph, given)
        assert difference(run(program, graph, given), wanted) < 1e-5
        assert difference(run(plain(), graph, given), wanted) > 0.01


def test_a_recipe_transforms_without_weights() -> None:
    bare, (program, state) = from_recipe(), loaded()
    assert all(value.is_meta for value in bare.weights.values())
    specs = [{n: TensorSpec.of(v) for n, v in p.weights.items()} for p in (bare, program)]
    assert specs[0] == specs[1]
    assert "no weights" in refused(instantiate, bare)
    assert {value.dtype for value in state.values()} == {torch.bfloat16, torch.float32}
    name = f"{MODULES[0]}.weight"
    assert torch.equal(program.unmap_state(program.weights)[name], decoded(state[name]).bfloat16())
    assert same(program.weights, program.weights | packed(state[name], MODULES[0]))


def test_bfloat16_runs_and_exports() -> None:
    program, state = loaded()
    given = inputs(program, "step")
    result = run(program, "step", given)
    assert all(value.dtype == torch.bfloat16 for value in result.values())
    assert same(reexported(program, "step", given), result)
    held = instantiate(program).state_dict()
    name = "blocks.0.attn1.to_q.weight"
    assert state[name].dtype == torch.bfloat16
    assert held[f"{name}_values"].dtype == torch.float8_e4m3fn
    assert held[f"{name}_row_scales"].dtype == torch.float32


@torch.no_grad()
def rolled(program: Program, chunks: int = 6) -> Tensor:
    """The flow of every chunk of a stream. Noise and prompts are equal at every call."""
    rollout = Rollout(program, instantiate(program))
    geometry, spec = program.geometry, program.spec
    generator = torch.Generator().manual_seed(0)
    shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
    rollout.set_text(torch.randn(1, geometry.text_tokens, spec.text_dim, generator=generator))
    flows = []
    for chunk in range(chunks):
        noise = torch.randn(shape, generator=generator)
        positions = torch.arange(geometry.chunk, dtype=torch.float64) + chunk * geometry.chunk
        level = torch.full((1, geometry.chunk), 500.0)
        flows.append(rollout.step(noise, level, positions))
        rollout.commit(noise - flows[-1] / 2, positions)
    return torch.stack(flows)


def test_a_stream_stays_near_the_plain_one() -> None:
    """The stream has more chunks than the window holds."""
    wanted, ours = rolled(plain()), rolled(quantised())
    errors = (ours - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert float(errors.min()) > 0.005 and float(errors.max()) < 0.1
    other = with_weights(plain(), plain().weights | {NAME: -plain().weights[NAME]})
    wrong = (rolled(other) - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert float(wrong.min()) > 0.1


def test_memory_counts_eight_bits() -> None:
    saved = estimate(plain())["weights"] - estimate(quantised())["weights"]
    linears = [plain().weights[f"{module}.weight"] for module in LINEARS]
    assert saved == sum(3 * t.numel() - 4 * t.shape[0] for t in linears)


def test_what_is_kept_is_reported() -> None:
    program = converted(
        include=r"blocks\.\d+\.(attn[12]\..*|ffn\.net\.2)",
        exclude=[r".*attn2\.to_[kv]", r"blocks\.0\.attn1\.to_q"],
        keep_last=0.5,
    )
    kept = {reason: set(names) for reason, names in program.log[-3].kept.items()}
    outside = kept["not among include"]
    assert outside & LINEARS == {f"blocks.{i}.ffn.net.0.proj" for i in range(2)}
    assert "proj_out" in outside
    assert kept[r"excluded by '.*attn2\\.to_[kv]'"] == {
        f"blocks.{i}.attn2.to_{part}" for i in range(2) for part in "kv"
    }
    assert kept[r"excluded by 'blocks\\.0\\.attn1\\.to_q'"] == {"blocks.0.attn1.to_q"}
    last = kept["in the last 50% of the blocks"]
    assert last and all(name.startswith("blocks.1.") for name in last)
    left = {f"blocks.0.{kind}" for kind in ("attn1.to_k", "attn1.to_v", "attn1.to_out.0")}
    left |= {f"blocks.0.{kind}" for kind in ("attn2.to_q", "attn2.to_out.0", "ffn.net.2")}
    ending = ".weight_values"
    found = {n.removesuffix(ending) for n in program.weights if n.endswith(ending)}
    assert found == left
    assert set(program.log[-3].matches) == {name.removeprefix("blocks.0.") for name in left}
    assert all(f"{module}.weight" in program.weights for module in LINEARS - left)
    assert set(quantised().log[-3].kept) == {"not among include"}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_bad_patterns_are_refused(option: str) -> None:
    value = "(" if option == "include" else ["("]
    message = refused(after, made(), {"fp8_infer": {option: value}})
    assert f"{option}: '(' is not a regular expression" in message


def test_matching_nothing_is_an_error() -> None:
    message = refused(after, made(), {"fp8_infer": {"include": "nothing"}})
    assert message.startswith("fp8_infer: matched nothing: linear (blocks.0.attn1.to_q): not among")


def test_ragged_widths_are_refused_by_name_or_padded() -> None:
    assert refused(after, ragged(), "fp8_infer") == (
        "fp8_infer: blocks.0.attn1.to_q: in 10 and out 24 features are not a multiple of 16; "
        r"exclude it with exclude=['blocks\\.0\\.attn1\\.to_q'], or set ragged=pad"
    )
    program = after(ragged(), {"fp8_infer": {"ragged": "pad"}})
    assert program.weights[f"{MODULES[0]}.weight_values"].shape == (24, 10)
    state = program.unmap_state(program.weights)
    given = inputs(program, "step")
    x = decoded(given["hidden_states"])
    q, k = (x @ state[f"{module}.weight"].t() for module in MODULES)
    wanted = {"sample": q + k + state[f"{MODULES[0]}.bias"]}
    assert difference(run(program, "step", given), wanted) < 1e-6
    assert difference(run(ragged(), "step", given), wanted) > 0.01


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    spoiled = normal(32, 16)
    spoiled[5, 3] = bad
    weights = WEIGHTS | {"blocks.0.attn1.to_k.weight": spoiled}
    assert "blocks.0.attn1.to_k.weight: is not finite; repair" in refused(
        after, made(weights), "fp8_infer"
    )
    program = after(made(), "fp8_infer")
    assert "blocks.0.attn1.to_k.weight: is not finite" in refused(with_weights, program, weights)


TO_Q = f"{MODULES[0]}.weight"
VALUES, SCALES = f"{TO_Q}_values", f"{TO_Q}_row_scales"


def e4m3(byte: int) -> Tensor:
    """Ones in E4M3, of which one byte is another."""
    values = torch.ones(32, 16).to(torch.float8_e4m3fn)
    values.view(torch.uint8)[5, 3] = byte
    return values


def rows(value: float) -> Tensor:
    """Scales of one, of which one row is another."""
    return torch.ones(32, 1).index_fill(0, torch.tensor(5), value)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({VALUES: None}, f"{MODULES[0]} is quantised, but {VALUES} is missing; add"),
        ({SCALES: None}, f"{MODULES[0]} is quantised, but {SCALES} is missing; add"),
        ({TO_Q: WEIGHTS[TO_Q]}, f"{MODULES[0]} has a plain weight and a quantised one; keep one"),
        ({VALUES: torch.ones(32, 16)}, f"{VALUES} is torch.float32, not torch.float8_e4m3fn"),
        ({VALUES: e4m3(1).view(torch.uint8)}, f"{VALUES} is torch.uint8, not torch.float8_e4m3fn"),
        ({VALUES: e4m3(1)[None]}, f"{VALUES} is (1, 32, 16); values are [N, K]; quantise"),
        ({VALUES: e4m3(1)[:, :8]}, "1 misshapen"),
        ({SCALES: rows(1).double()}, f"{SCALES} is torch.float64, not torch.float32"),
        ({SCALES: torch.ones(32)}, f"{SCALES} is (32,); values of (32, 16) have scales of (32, 1)"),
        ({SCALES: torch.ones(16, 1)}, f"{SCALES} is (16, 1); values of (32, 16) have scales of"),
        ({SCALES: rows(torch.nan)}, f"{SCALES}: 1 of 32 are not finite and above 0"),
        ({SCALES: rows(torch.inf)}, f"{SCALES}: 1 of 32 are not finite and above 0"),
        ({SCALES: rows(0.0)}, f"{SCALES}: 1 of 32 are not finite and above 0"),
        ({SCALES: rows(-1.0)}, f"{SCALES}: 1 of 32 are not finite and above 0"),
        ({VALUES: e4m3(0x7F)}, f"{VALUES}: 1 of 512 are NaN; quantise"),
        ({VALUES: e4m3(0xFF)}, f"{VALUES}: 1 of 512 are NaN; quantise"),
    ],
)
def test_bad_packed_weights_are_refused(
    change: dict[str, Tensor | None], message: str, reverse: bool
) -> None:
    """They are refused in whatever order the state holds them."""
    program = converted_by_hand()
    entries = [(n, t) for n, t in (program.weights | change).items() if t is not None]
    state = dict(reversed(entries) if reverse else entries)
    found = refused(with_weights, program, state)
    assert found.startswith("weights: ") and message in found
    others = {VALUES: e4m3(0xFE), SCALES: rows(2.0)}
    assert same(with_weights(program, program.weights | others).weights, program.weights | others)


def test_packed_weights_without_numbers_are_checked_too() -> None:
    state = {VALUES: e4m3(1).to("meta"), SCALES: rows(1).to("meta")}
    check_fp8_weights(state, "here")
    message = refused(check_fp8_weights, state | {SCALES: torch.ones(32, device="meta")}, "here")
    assert message.startswith(f"here: {SCALES} is (32,); values of (32, 16)")


def test_a_program_is_saved_and_loaded(tmp_path: Path) -> None:
    program, state = loaded()
    save_program(program, tmp_path / "program")
    again = load_program(tmp_path / "program")
    assert fingerprint(again) == fingerprint(program)
    assert same(again.weights, program.weights)
    assert again.log[-3].kept == program.log[-3].kept
    assert program.log[-3].kept[r"excluded by '.*attn2\\.to_q'"] == ["blocks.0.attn2.to_q"]
    other = with_weights(program, randomise(state, seed=1))
    for graph in program.graphs:
        given = inputs(program, graph)
        assert same(run(again, graph, given), run(program, graph, given))
        assert not same(run(again, graph, given), run(other, graph, given))


def test_a_broken_weight_is_not_saved(tmp_path: Path) -> None:
    program = after(made(), "fp8_infer")
    program.weights["blocks.0.attn1.to_q.weight_row_scales"] *= -1
    assert "not finite and above 0" in refused(save_program, program, tmp_path / "program")
    assert not (tmp_path / "program").exists()


def test_lowered_to_torch_the_bits_are_the_references() -> None:
    reference, program = quantised(), converted(lower={"row_pipeline": "torch"})
    assert program.implementations["row_pipeline"] == "torch"
    assert program.log[-1].matches["row_pipeline → torch"] > 0
    written = "".join(texts(program).values())
    assert "lltk.ops.row_pipeline.reference.row_pipeline(" in written
    assert "lltk.row_pipeline.default" not in written
    for graph in program.graphs:
        given = inputs(program, graph)
        assert same(run(program, graph, given), run(reference, graph, given))
        assert not same(run(program, graph, given), run(plain(), graph, given))


def test_lowered_to_scaled_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is refused, although torch's product would run there."""
    before = after(ragged(), {"fp8_infer": {"ragged": "pad"}}, "regionalise")
    program = after(before, {"lower": {"row_pipeline": "torch", "fp8_matmul": "scaled_mm"}})
    assert program.log[-1].matches.keys() == {"row_pipeline → torch", "fp8_matmul → scaled_mm"}
    assert refused(instantiate, program) == (
        "fp8_matmul: scaled_mm runs on cuda, not on cpu; cpu has reference: set fp8_matmul of the "
        "recipe's lower pass, or leave out the pass that makes fp8_matmul"
    )
    given = inputs(program, "step")
    wanted = run(before, "step", given)
    monkeypatch.setattr("lltk.graph.module.check_device", lambda chosen, device: None)
    assert 0 < difference(run(program, "step", given), wanted) < 2**-6
    assert difference(run(program, "step", inputs(program, "step", seed=1)), wanted) > 0.1


@pytest.mark.parametrize("kind", ["score", "reference"])
def test_other_kinds_that_infer(kind: Kind) -> None:
    program = after(made(kind=kind), "fp8_infer")
    assert text(program, kind) == AFTER.strip().replace("step", kind)


def test_training_is_not_for_it() -> None:
    assert "train" in refused(after, made(kind="train"), "fp8_infer")
