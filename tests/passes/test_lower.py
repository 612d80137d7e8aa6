"""lower: each op runs as the recipe says, and the choice is recorded."""

from __future__ import annotations

import sys
from pathlib import Path

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
lltk.ops.block_causal_attention.sdpa.block_causal_attention(q, q, q, 8, False)
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
    config = program.log[-1].config
    assert config.pop("prefer") == [] and set(config.values()) == {None}
    for _, graph in program.every_graph():
        assert not graph.find_nodes(op="call_function", target=overload(op))


def test_a_choice_for_an_op_that_is_not_there_is_refused() -> None:
    before = regional("stream")
    message = refused(after, before, {"lower": {"nvfp4_paged_attention": "decode"}})
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
    """The lowered program with keys in the place of values."""
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
            "block_causal_attention has no implementation 'spda' (it has reference, cudnn, flex, "
            "sdpa); did you mean 'sdpa'?",
        ),
        (
            {"paged_attention": "flex"},
            "paged_attention has no implementation 'flex' (it has reference, arena, cudnn",
        ),
    ],
)
def test_unknown_implementations_are_refused(options: dict[str, str], message: str) -> None:
    """Even for an op that the program does not hold."""
    assert message in refused(after, made(), {"lower": options})


def test_ops_without_a_key_take_what_is_preferred() -> None:
    """An op takes the first name that it has, unless its key names another."""
    before = regional("stream")
    program = after(before, {"lower": {"prefer": ["arena"]}})
    assert program.implementations == {"paged_attention": "arena"}
    program = after(before, {"lower": {"prefer": ["reference"]}})
    assert program.implementations == {"paged_attention": "reference"}
    for options in (
        {"prefer": ["reference", "arena"]},
        {"prefer": ["arena"], "paged_attention": "sdpa"},
    ):
        message = refused(after, before, {"lower": options})
        assert message == (
            "lower: prefer: no op of this program takes arena; remove the name, or add a pass that "
            "makes an op that has it (there is paged_attention)"
        )


def test_unknown_names_are_not_preferred() -> None:
    message = refused(after, regional("stream"), {"lower": {"prefer": ["tritn"]}})
    assert "prefer: no op has an implementation 'tritn' (there is arena, cudnn," in message


@pytest.mark.parametrize(("name", "new"), [("triton", "triton"), ("te", "te, triton")])
def test_the_key_of_before_names_the_new_one(name: str, new: str) -> None:
    message = refused(after, regional("stream"), {"lower": {"nvfp4": name}})
    assert message == (
        f"passes: lower: nvfp4 is no key any more: write prefer: [{new}] in its place"
    )


@pytest.mark.parametrize("name", ["fp8_quantise", "fp8_quantise_add_norm", "gated_add"])
def test_keys_of_ops_that_are_one_now_name_it(name: str) -> None:
    message = refused(after, regional("stream"), {"lower": {name: "triton"}})
    assert message == (f"passes: lower: {name} is no key any more: write row_pipeline in its place")


OWN = """
from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.paged_attention.reference import attention, gather

DECLARATION = Declaration(Exactness.BITWISE, "keys and values by hand")


def paged_attention(q, k, v, k_pages, v_pages, table):
    return attention(q, gather(k, k_pages, table), gather(v, v_pages, table))
"""


@pytest.mark.parametrize("opaque", [False, True])
def test_a_module_of_the_users_runs_an_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opaque: bool
) -> None:
    folder = tmp_path / f"my_kernels_{opaque}"
    folder.mkdir()
    (folder / "fast.py").write_text(OWN.replace('hand")', f'hand", opaque={opaque})'))
    monkeypatch.syspath_prepend(tmp_path)
    name, before = f"{folder.name}.fast", regional("stream")
    program = after(before, {"lower": {"paged_attention": name}})
    assert program.implementations == {"paged_attention": name}
    assert program.log[-1].matches == {f"paged_attention → {name}": 1}
    operator = f"lltk.paged_attention_{folder.name}_fast.default("
    called = operator if opaque else f"{name}.paged_attention("
    assert any(called in graph for graph in texts(program).values())
    given = inputs(program, "step")
    assert same(run(program, "step", given), run(before, "step", given))


WRITE = """
from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(Exactness.BITWISE, "a page by its index", opaque=OPAQUE)


def write_page(pages, value, slot):
    pages[:, slot.item()] = value
"""


@pytest.mark.parametrize("opaque", [False, True])
def test_what_the_users_module_writes_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opaque: bool
) -> None:
    """Nothing reads the result of a write, which is no reason to drop it."""
    folder = tmp_path / f"my_writer_{opaque}"
    folder.mkdir()
    (folder / "own.py").write_text(WRITE.replace("OPAQUE", str(opaque)))
    monkeypatch.syspath_prepend(tmp_path)
    before = regional("stream")
    program = after(before, {"lower": {"write_page": f"{folder.name}.own"}})
    assert program.implementations["write_page"] == f"{folder.name}.own"
    given = inputs(program, "commit")
    written = run(program, "commit", given)
    assert same(written, run(after(before, "lower"), "commit", given))
    assert any(not same({name: page}, {name: given[name]}) for name, page in written.items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "Python finds no module 'my_kernels_bad.own'; run `python -m lltk` in the folder"),
        ("", "own.py: declares no implementation of paged_attention; assign DECLARATION"),
        (
            OWN.replace("table)", "pages)", 1),
            "own.py: define a function paged_attention(q, k, v,",
        ),
        (
            OWN.replace("attention.reference", "attention.nowhere"),
            "own.py: cannot be imported (Module",
        ),
    ],
)
def test_modules_that_do_not_fit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, said: str
) -> None:
    (tmp_path / "my_kernels_bad").mkdir()
    if text is not None:
        (tmp_path / "my_kernels_bad" / "own.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("my_kernels_bad", "my_kernels_bad.own"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    name = "my_kernels_bad.own"
    assert said in refused(after, regional("stream"), {"lower": {"paged_attention": name}})


def test_unknown_ops_are_refused() -> None:
    assert refused(after, made(), {"lower": {"paged_atention": "sdpa"}}) == (
        "passes: lower: unknown key 'paged_atention'; did you mean 'paged_attention'?"
    )


@pytest.mark.parametrize(("kind", "name"), [("stream", "cudnn"), ("train", "flex")])
def test_gpu_implementations_transform_here_but_do_not_run(kind: Kind, name: str) -> None:
    """A laptop can make a program for a GPU; running it says what this device has."""
    program = after(regional(kind), {"lower": {OPS[kind]: name}})
    assert program.log[-1].matches == {f"{OPS[kind]} → {name}": 1}
    able = "reference and arena and sdpa" if kind == "stream" else "reference and sdpa"
    assert refused(instantiate, program) == (
        f"{OPS[kind]}: {name} runs on cuda, not on cpu; cpu has {able}: "
        f"set {OPS[kind]} of the recipe's lower pass"
    )


def test_graph_without_ops_is_refused() -> None:
    call = "lltk.block_causal_attention.default(q, q, q, 8, False)"
    message = refused(after, made(CAUSAL.replace(call, "aten.neg.default(q)")), "lower")
    assert message.startswith("lower: matched nothing: the graphs hold no candidate for it")


def test_only_autoencoders_are_lowered_before_their_regions() -> None:
    message = refused(after, reached("stream", "canonicalise"), "lower")
    assert message.startswith("lower: reads a regional program, this one is canonical; move it")
