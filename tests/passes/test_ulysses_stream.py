"""ulysses_stream: ranks share a chunk's frames, and the heads of self-attention."""

from __future__ import annotations

import pytest
import torch
from helpers import PASSES, after, hand_made, inputs, reached, refused, run, same, text
from ranks import alike

from lltk.compiler import transform
from lltk.graph.contract import Role
from lltk.graph.diagnose import first_bad_node
from lltk.graph.edit import building, calls, input_of, op_of, shape
from lltk.graph.facts import Ranks
from lltk.graph.infer import infer
from lltk.graph.memory import estimate
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.graph.stages import Stage
from lltk.models.configs import named_config
from lltk.parallel.exchange import HEADS_TO_TOKENS, RECEIVE_HEADS, SEND_TOKENS, TOKENS_TO_HEADS
from lltk.passes.ulysses_stream import FP8_DEQUANTISE

pytestmark = pytest.mark.cpu
aten = torch.ops.aten

STEPS = PASSES["stream"][:6]
ARENAS = "k_pages_0: pages(bf16[1, 4, 8, 2, 12]), v_pages_0: pages(bf16[1, 4, 8, 2, 12])"
HALVES = ARENAS.replace("2, 12", "1, 12")
BEFORE = {
    "prologue": """
    def prologue(encoder_hidden_states: text(bf16[1, 5, 2, 12])):
        # root
        neg: bf16[1, 5, 2, 12] = aten.neg.default(encoder_hidden_states)
        return {'cross_k_0': neg}
    """,
    "step": f"""
    def step(hidden_states: latents(bf16[1, 24, 2, 2, 2]), table: table(i64[3]), {ARENAS}):
        # blocks.0.attn1
        x: bf16[1, 8, 2, 12] = aten.reshape.default(hidden_states, [1, -1, 2, 12])
        half: bf16[1, 8, 2, 12] = aten.mul.Tensor(x, 0.5)
        q: bf16[1, 8, 2, 12] = aten.sin.default(half)
        k: bf16[1, 8, 2, 12] = aten.neg.default(x)
        v: bf16[1, 8, 2, 12] = aten.abs.default(x)
        attend: bf16[1, 8, 2, 12] = \
lltk.paged_attention.default(q, k, v, k_pages_0, v_pages_0, table)
        # root
        join: bf16[1, 8, 24] = aten.flatten.using_ints(attend, 2, 3)
        split: bf16[1, 2, 4, 24] = aten.unflatten.int(join, 1, [2, 4])
        return {{'sample': split}}
    """,
    "commit": f"""
    def commit(hidden_states: latents(bf16[1, 24, 2, 2, 2]), {ARENAS}, slot: slot(i64[1])):
        # blocks.0.attn1
        k: bf16[1, 8, 2, 12] = aten.reshape.default(hidden_states, [1, -1, 2, 12])
        v: bf16[1, 8, 2, 12] = aten.neg.default(k)
        write: None = lltk.write_page.default(k_pages_0, k, slot)
        write_1: None = lltk.write_page.default(v_pages_0, v, slot)
        return {{}}
    """,
}
STEP = f"""
def step(hidden_states: latents(bf16[1, 24, 2, 2, 2]), table: table(i64[3]), {HALVES}):
    # root
    own_part: bf16[1, 24, 1, 2, 2] = lltk.own_part.default(hidden_states, 2, 2, 'sequence')
    # blocks.0.attn1
    x: bf16[1, 4, 2, 12] = aten.reshape.default(own_part, [1, -1, 2, 12])
    k: bf16[1, 4, 2, 12] = aten.neg.default(x)
    v: bf16[1, 4, 2, 12] = aten.abs.default(x)
    send_tokens: u8[2, 192] = lltk.send_tokens.default([k, v], 2, 'sequence')
    half: bf16[1, 4, 2, 12] = aten.mul.Tensor(x, 0.5)
    q: bf16[1, 4, 2, 12] = aten.sin.default(half)
    tokens_to_heads: (bf16[1, 8, 1, 12],) = lltk.tokens_to_heads.default([q], 2, 'sequence')
    getitem: bf16[1, 8, 1, 12] = getitem(tokens_to_heads, 0)
    receive_heads: (bf16[1, 8, 1, 12], bf16[1, 8, 1, 12],) = \
lltk.receive_heads.default(send_tokens, [k, v], 2, 'sequence')
    getitem_1: bf16[1, 8, 1, 12] = getitem(receive_heads, 0)
    getitem_2: bf16[1, 8, 1, 12] = getitem(receive_heads, 1)
    attend: bf16[1, 8, 1, 12] = lltk.paged_attention.default(getitem, getitem_1, getitem_2, \
k_pages_0, v_pages_0, table)
    heads_to_tokens: (bf16[1, 4, 2, 12],) = lltk.heads_to_tokens.default([attend], 2, 'sequence')
    getitem_3: bf16[1, 4, 2, 12] = getitem(heads_to_tokens, 0)
    # root
    join: bf16[1, 4, 24] = aten.flatten.using_ints(getitem_3, 2, 3)
    all_parts: bf16[1, 8, 24] = lltk.all_parts.default(join, 1, 2, 'sequence')
    split: bf16[1, 2, 4, 24] = aten.unflatten.int(all_parts, 1, [2, 4])
    return {{'sample': split}}
"""
COMMIT = f"""
def commit(hidden_states: latents(bf16[1, 24, 2, 2, 2]), {HALVES}, slot: slot(i64[1])):
    # root
    own_part: bf16[1, 24, 1, 2, 2] = lltk.own_part.default(hidden_states, 2, 2, 'sequence')
    # blocks.0.attn1
    k: bf16[1, 4, 2, 12] = aten.reshape.default(own_part, [1, -1, 2, 12])
    v: bf16[1, 4, 2, 12] = aten.neg.default(k)
    tokens_to_heads: (bf16[1, 8, 1, 12],) = lltk.tokens_to_heads.default([k], 2, 'sequence')
    getitem: bf16[1, 8, 1, 12] = getitem(tokens_to_heads, 0)
    write: None = lltk.write_page.default(k_pages_0, getitem, slot)
    tokens_to_heads_1: (bf16[1, 8, 1, 12],) = lltk.tokens_to_heads.default([v], 2, 'sequence')
    getitem_1: bf16[1, 8, 1, 12] = getitem(tokens_to_heads_1, 0)
    write_1: None = lltk.write_page.default(v_pages_0, getitem_1, slot)
    return {{}}
"""
IN_FP8 = """
    row_pipeline: (f8e4m3[1, 4, 2, 12], f32[1, 4, 2, 1],) = \
lltk.row_pipeline.default(k, to='fp8')
    getitem: f8e4m3[1, 4, 2, 12] = getitem(row_pipeline, 0)
    getitem_1: f32[1, 4, 2, 1] = getitem(row_pipeline, 1)
    tokens_to_heads: (f8e4m3[1, 8, 1, 12], f32[1, 8, 1, 1],) = \
lltk.tokens_to_heads.default([getitem, getitem_1], 2, 'sequence')
    getitem_2: f8e4m3[1, 8, 1, 12] = getitem(tokens_to_heads, 0)
    getitem_3: f32[1, 8, 1, 1] = getitem(tokens_to_heads, 1)
    fp8_dequantise: bf16[1, 8, 1, 12] = \
lltk.fp8_dequantise.default(getitem_2, getitem_3, torch.bfloat16)
    write: None = lltk.write_page.default(k_pages_0, fp8_dequantise, slot)
"""
IN_NVFP4 = """
    nvfp4_quantise: (u8[1, 4, 2, 8], f8e4m3[1, 4, 2, 1], f32[()],) = \
lltk.nvfp4_quantise.default(k)
    getitem: u8[1, 4, 2, 8] = getitem(nvfp4_quantise, 0)
    getitem_1: f8e4m3[1, 4, 2, 1] = getitem(nvfp4_quantise, 1)
    getitem_2: f32[()] = getitem(nvfp4_quantise, 2)
    expand: f32[1, 1, 2] = aten.expand.default(getitem_2, [1, 1, 2])
    tokens_to_heads: (u8[1, 8, 1, 8], f8e4m3[1, 8, 1, 1], f32[1, 2, 1],) = \
lltk.tokens_to_heads.default([getitem, getitem_1, expand], 2, 'sequence')
    getitem_3: u8[1, 8, 1, 8] = getitem(tokens_to_heads, 0)
    getitem_4: f8e4m3[1, 8, 1, 1] = getitem(tokens_to_heads, 1)
    getitem_5: f32[1, 2, 1] = getitem(tokens_to_heads, 2)
    unflatten: u8[1, 2, 4, 1, 8] = aten.unflatten.int(getitem_3, 1, [2, -1])
    unflatten_1: f8e4m3[1, 2, 4, 1, 1] = aten.unflatten.int(getitem_4, 1, [2, -1])
    select: f32[1, 2] = aten.select.int(getitem_5, 2, 0)
    nvfp4_dequantise: bf16[1, 2, 4, 1, 16] = \
lltk.nvfp4_dequantise.default(unflatten, unflatten_1, select, torch.bfloat16)
    flatten: bf16[1, 8, 1, 16] = aten.flatten.using_ints(nvfp4_dequantise, 1, 2)
    write: None = lltk.write_page.default(k_pages_0, flatten, slot)
"""


def made() -> Program:
    return hand_made("stream", Stage.CAUSAL, BEFORE)


def shared(*steps: str, **options: object) -> Program:
    return after(reached("stream", *STEPS, *steps, head_dim=16), {"ulysses_stream": options})


def test_rewrites_the_text() -> None:
    program = after(made(), {"ulysses_stream": {"exchange": "compute"}})
    assert text(program, "step") == STEP.strip()
    assert text(program, "commit") == COMMIT.strip()
    assert text(program, "prologue") == text(made(), "prologue")
    assert (program.stage, program.fact(Ranks).count) == (Stage.PARTITIONED, 2)


def test_only_zeros_that_stand_in_for_timesteps_are_shared() -> None:
    """Other zeros of the same shape stay as they are."""
    program = after(reached("stream", *STEPS))
    commit = program.graphs["commit"]
    (own,) = calls(commit, aten.new_zeros.default)
    latents = input_of(commit, Role.LATENTS)
    with building(next(node for node in commit.nodes if node in latents.users), "") as build:
        other = build(aten.new_zeros.default, latents, [1, 2])
        shifted = build(aten.add.Tensor, latents, build(aten.sum.default, other))
    latents.replace_all_uses_with(shifted, lambda user: user not in (own, other, shifted))
    infer(program, commit)
    assert shape(own) == shape(other)
    zeros = calls(after(program, "ulysses_stream").graphs["commit"], aten.new_zeros.default)
    assert {node.name: shape(node) for node in zeros} == {own.name: (1, 1), other.name: (1, 2)}


def test_keys_and_values_travel_in_fp8() -> None:
    program = after(made(), "ulysses_stream")
    assert IN_FP8.strip() in text(program, "commit")
    parts = "[getitem, getitem_1, getitem_2, getitem_3], 2, 'sequence')"
    assert f"lltk.send_tokens.default({parts}" in text(program, "step")
    assert f"lltk.receive_heads.default(send_tokens, {parts}" in text(program, "step")
    assert "lltk.tokens_to_heads.default([q], 2, 'sequence')" in text(program, "step")


def test_keys_and_values_travel_in_nvfp4() -> None:
    """A message has codes, block scales and the decode scale of its rank's tokens."""
    texts = {name: graph.replace("12", "16").replace("24", "32") for name, graph in BEFORE.items()}
    before = hand_made("stream", Stage.CAUSAL, texts, head_dim=16)
    program = after(before, {"ulysses_stream": {"exchange": "nvfp4"}})
    assert IN_NVFP4.strip() in text(program, "commit")
    (sent,) = calls(program.graphs["step"], SEND_TOKENS)
    filled = 16  # bytes, to which block scales and decode scale are filled up
    assert sent.meta["val"].shape == (2, 2 * (4 * 8 + 2 * filled))


def test_queries_and_results_travel_in_fp8() -> None:
    program = after(made(), {"ulysses_stream": {"exchange_queries": "fp8"}})
    graph = program.graphs["step"]
    for op in (TOKENS_TO_HEADS, HEADS_TO_TOKENS):
        (sent,) = calls(graph, op)
        assert [x.meta["val"].dtype for x in sent.args[0]] == [torch.float8_e4m3fn, torch.float32]
    (attend,) = calls(graph, torch.ops.lltk.paged_attention.default)
    (join,) = calls(graph, aten.flatten.using_ints)
    assert op_of(attend.args[0]) is op_of(join.args[0]) is FP8_DEQUANTISE


def test_heads_that_are_not_whole_blocks_are_refused_in_nvfp4() -> None:
    assert refused(after, made(), {"ulysses_stream": {"exchange": "nvfp4"}}) == (
        "ulysses_stream: exchange: nvfp4 is for heads of whole blocks of 16, and the model's are "
        "12 wide; set fp8 or compute"
    )


@pytest.mark.parametrize("cache", [None, "nvfp4_cache"])
@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int, cache: str | None) -> None:
    """The commit's last block ends at its K/V; step and commit share their other blocks."""
    steps = [*STEPS, *([cache] if cache else [])]
    before = reached("stream", *steps, layers=layers, head_dim=16)
    program = after(before, "ulysses_stream")
    assert program.log[-1].matches == {
        "self-attention": 2 * layers - 1,
        "pages": 2 * layers,
        "inputs": 5,
        "outputs": 1,
    }
    assert estimate(before)["cache pages"] == 2 * estimate(program)["cache pages"]
    regional = after(program, "regionalise", "lower")
    assert regional.regions.keys() == after(before, "regionalise", "lower").regions.keys()


def test_graphs_take_and_give_whole_chunks() -> None:
    before, program = reached("stream", *STEPS, head_dim=16), shared()
    for graph in program.graphs:
        ours, theirs = program.contract(graph), before.contract(graph)
        assert ours.outputs == theirs.outputs
        assert {n for n in ours.inputs if ours.inputs[n] != theirs.inputs[n]} <= set(before.pages)


@torch.no_grad()
def test_ranks_that_hold_the_same_frames() -> None:
    """A made-up group: both halves of the result are of the first frame, by its own time."""
    program = shared(exchange="compute")
    given = inputs(program, "step")
    with alike():
        sample = run(program, "step", given)["sample"]
        given["hidden_states"][:, :, 1] += 1
        given["timestep"][:, 1] += 100
        given["positions"][1] += 1
        assert same(run(program, "step", given), {"sample": sample})
        given["timestep"][:, 0] += 100
        assert not same(run(program, "step", given), {"sample": sample})
    assert torch.equal(sample[:, :, 0], sample[:, :, 1])


@torch.no_grad()
def test_blocks_compile() -> None:
    program = after(shared(), "regionalise", "lower")
    given = inputs(program, "step")
    with alike():
        wanted = run(program, "step", given)["sample"]
        module = instantiate(program)
        module.compile_blocks(backend="aot_eager")
        assert torch.equal(module("step", dict(given))["sample"], wanted)


def test_a_pass_follows_one_that_failed_during_an_exchange() -> None:
    program = after(shared(exchange="compute"), "regionalise", "lower")
    given, name = inputs(program, "step"), "blocks.0.attn1.to_q.weight"
    with alike(), torch.no_grad():
        wanted = instantiate(program)("step", dict(given))
        module = instantiate(program)
        queries = module.get_parameter(name)
        kept = queries.clone()
        queries.fill_(1e38)
        assert first_bad_node(program, module, "step", given) == "linear_2 (blocks.0.attn1.to_q)"
        queries.copy_(kept)
        assert same(module("step", dict(given)), wanted)


@pytest.mark.parametrize(("size", "fit"), [(3, "2"), (4, "2")])
def test_sizes_that_do_not_divide_are_refused(size: int, fit: str) -> None:
    before = reached("stream", *STEPS, head_dim=16)
    assert refused(after, before, {"ulysses_stream": {"size": size}}) == (
        f"ulysses_stream: size: {size} ranks cannot share 2 heads and chunks of 2 latent frames "
        f"evenly; set a size that can ({fit}), or geometry.chunk"
    )


def test_no_size_divides_chunks_of_three() -> None:
    sizes = {"chunk": 3, "window": 9, "sink": 3, "frames": 3}
    program = hand_made("stream", Stage.CAUSAL, BEFORE, **sizes)
    assert "(there is none), or geometry.chunk" in refused(after, program, "ulysses_stream")


def test_the_large_recipe_holds_half_the_heads() -> None:
    """Its cache is in NVFP4 and its linears are in FP8."""
    config = named_config("wan22_5b") | {"num_layers": 1}
    recipe = open_recipe("wan22_5b_stream_sp2", ())
    model = recipe.model.model_copy(update={"config": config})
    program = transform(recipe.model_copy(update={"model": model}), weights=False)
    assert program.pages["k_pages_codes_0"].shape == (1, 4, 7040, 12, 64)
    (received,) = calls(program.regions["step_block"].graph, RECEIVE_HEADS)
    dtypes = [torch.float8_e4m3fn, torch.float32] * 2
    assert [value.dtype for value in received.meta["val"]] == dtypes
