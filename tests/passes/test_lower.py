"""lower: each op runs as the recipe says, and the choice is recorded."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    PASSES,
    after,
    difference,
    hand_made,
    inputs,
    reached,
    refused,
    run,
    same,
    text,
    texts,
)

from lltk.graph.geometry import Kind
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

pytestmark = pytest.mark.cpu

CAUSAL = """
    def score(q: f32[1, 24, 1, 3]):
        # blocks.0.attn1
        attend: f32[1, 24, 1, 3] = lltk.block_causal_attention.default(q, q, q, 8, False)
        return {'sample': attend}
"""
LOWERED = """
def score_block(q: f32[1, 24, 1, 3]):
    # attn1
    block_causal_attention: f32[1, 24, 1, 3] = \
lltk.ops.block_causal_attention.sdpa.sdpa(q, q, q, 8, False)
    return (block_causal_attention,)
"""
OPS = {"train": "block_causal_attention", "score": "block_causal_attention"} | {
    "stream": "paged_attention"
}


def made(score: str = CAUSAL) -> Program:
    return after(hand_made("score", Stage.CAUSAL, {"score": score}), "regionalise")


def regional(kind: Kind, layers: int = 2) -> Program:
    return reached(kind, *PASSES[kind][:-1], layers=layers)


def test_rewrites_the_text() -> None:
    program = after(made(), "lower")
    assert text(program, "score_block") == LOWERED.strip()
    assert text(program, "score") == text(made(), "score")


def test_reference_is_the_op_itself() -> None:
    program = after(made(), {"lower": {"block_causal_attention": "reference"}})
    assert texts(program) == texts(made())
    assert program.log[-1].matches == {"block_causal_attention → reference": 1}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", OPS)
def test_matches_are_one_a_region_however_many_layers(kind: Kind, layers: int) -> None:
    op = OPS[kind]
    program = after(regional(kind, layers), "lower")
    assert program.log[-1].matches == {f"{op} → sdpa": 1}
    assert program.implementations == {op: "sdpa"}
    assert program.log[-1].config == {
        "paged_attention": "sdpa",
        "block_causal_attention": "sdpa",
        "nvfp4_paged_attention": "decode",
        "fp8_quantise": "reference",
        "fp8_quantise_norm": "reference",
        "fp8_quantise_add_norm": "reference",
        "fp8_quantise_gelu": "reference",
        "fp8_quantise_attention": "reference",
        "fp8_cached_norm_silu": "reference",
        "fp8_conv3d": "reference",
        "fp8_matmul": "reference",
        "cached_norm_silu": "reference",
        "upsample_residual": "reference",
        "gated_add": "reference",
        "rms_norm_rope": "reference",
        "nvfp4": "reference",
    }
    for _, graph in program.every_graph():
        assert not graph.find_nodes(op="call_function", target=overload(op))


def test_a_choice_for_an_op_that_is_not_there_is_refused() -> None:
    """Defaults may be written out."""
    before = regional("stream")
    after(before, {"lower": {"nvfp4_paged_attention": "decode", "fp8_quantise": "reference"}})
    message = refused(after, before, {"lower": {"nvfp4_paged_attention": "triton"}})
    assert message == (
        "lower: nvfp4_paged_attention: there is no such op to choose for; remove the key, or add "
        "the pass that makes the op (there is paged_attention)"
    )


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-5), (torch.float64, 1e-13)])
def test_outputs_agree_with_the_op(kind: Kind, dtype: torch.dtype | None, bound: float) -> None:
    before, program = regional(kind), after(regional(kind), "lower")
    name = "step" if kind == "stream" else kind
    given = inputs(program, name)
    wanted = run(before, name, given, dtype)
    assert difference(run(program, name, given, dtype), wanted) < bound
    reference = after(before, {"lower": {OPS[kind]: "reference"}})
    assert same(run(reference, name, given, dtype), wanted)
    assert difference(run(uncausal(program), name, given, dtype), wanted) > 0.01


def uncausal(program: Program) -> Program:
    """The lowered program with keys for values."""
    program = after(program)
    for region in program.regions.values():
        for node in region.graph.nodes:
            if "op" in node.meta:
                node.update_arg(2, node.args[1])
    return program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_causal_attention": "spda"},
            "block_causal_attention has no implementation 'spda' (it has reference, sdpa, flex); "
            "did you mean 'sdpa'?",
        ),
        (
            {"paged_attention": "flex"},
            "paged_attention has no implementation 'flex' (it has reference, sdpa, cudnn",
        ),
    ],
)
def test_unknown_implementations_are_refused(options: dict[str, str], message: str) -> None:
    """Even for an op that the program does not hold."""
    assert message in refused(after, made(), {"lower": options})


def test_unknown_ops_are_refused() -> None:
    assert refused(after, made(), {"lower": {"paged_atention": "sdpa"}}) == (
        "passes: lower: unknown key 'paged_atention'; did you mean 'paged_attention'?"
    )


@pytest.mark.parametrize(("kind", "name"), [("stream", "cudnn"), ("train", "flex")])
def test_gpu_implementations_transform_here_but_do_not_run(kind: Kind, name: str) -> None:
    """A laptop can make a program for a GPU; running it says what this device has."""
    program = after(regional(kind), {"lower": {OPS[kind]: name}})
    assert program.log[-1].matches == {f"{OPS[kind]} → {name}": 1}
    able = "reference and sdpa and arena" if kind == "stream" else "reference and sdpa"
    assert refused(instantiate, program) == (
        f"{OPS[kind]}: {name} runs on cuda, not on cpu; cpu has {able}: "
        f"set {OPS[kind]} of the recipe's lower pass"
    )


def test_graph_without_ops_is_refused() -> None:
    call = "lltk.block_causal_attention.default(q, q, q, 8, False)"
    message = refused(after, made(CAUSAL.replace(call, "aten.neg.default(q)")), "lower")
    assert message.startswith("lower: matched nothing: the graphs hold no candidate for it")


def test_only_decoders_are_lowered_before_their_regions() -> None:
    message = refused(after, reached("stream", "canonicalise"), "lower")
    assert message.startswith("lower: reads a regional program, this one is canonical; move it")
