"""balanced_sp gives each rank the clean and the noisy latents of the same frames."""

from __future__ import annotations

import pytest
import torch
from helpers import CANONICAL, after, hand_made, reached, refused, text
from ranks import alike

from lltk.graph.edit import calls, module_of, shape
from lltk.graph.facts import Ranks
from lltk.graph.joint import joint_graph
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.parallel.exchange import HEADS_TO_TOKENS, TOKENS_TO_HEADS

pytestmark = pytest.mark.cpu

BEFORE = """
    def train(noisy: latents(f32[1, 4, 4, 2, 2]), timestep: time(f32[1, 4]),
              encoder_hidden_states: text(f32[1, 2, 5, 3]), positions: positions(f64[4]),
              clean: clean(f32[1, 4, 4, 2, 2])):
        # root
        cat: f32[1, 4, 8, 2, 2] = aten.cat.default([clean, noisy], 2)
        flatten: f32[1, 4, 32] = aten.flatten.using_ints(cat, 2)
        transpose: f32[1, 32, 4] = aten.transpose.int(flatten, 1, 2)
        # blocks.0.attn1
        unflatten: f32[1, 32, 2, 2] = aten.unflatten.int(transpose, 2, [2, -1])
        neg: f32[1, 32, 2, 2] = aten.neg.default(unflatten)
        block_causal_attention: f32[1, 32, 2, 2] = \
lltk.block_causal_attention.default(unflatten, neg, unflatten, 8, True)
        # root
        chunk: (f32[1, 16, 2, 2], f32[1, 16, 2, 2],) = \
aten.chunk.default(block_causal_attention, 2, 1)
        getitem: f32[1, 16, 2, 2] = getitem(chunk, 1)
        return {'sample': getitem}
"""
AFTER = """
def train(noisy: latents(f32[1, 4, 2, 2, 2]), timestep: time(f32[1, 2]), \
encoder_hidden_states: text(f32[1, 1, 5, 3]), positions: positions(f64[2]), \
clean: clean(f32[1, 4, 2, 2, 2])):
    # root
    cat: f32[1, 4, 4, 2, 2] = aten.cat.default([clean, noisy], 2)
    flatten: f32[1, 4, 16] = aten.flatten.using_ints(cat, 2)
    transpose: f32[1, 16, 4] = aten.transpose.int(flatten, 1, 2)
    # blocks.0.attn1
    unflatten: f32[1, 16, 2, 2] = aten.unflatten.int(transpose, 2, [2, -1])
    neg: f32[1, 16, 2, 2] = aten.neg.default(unflatten)
    tokens_to_heads: (f32[1, 32, 1, 2], f32[1, 32, 1, 2], f32[1, 32, 1, 2],) = \
lltk.tokens_to_heads.default([unflatten, neg, unflatten], 2, 'sequence')
    getitem_1: f32[1, 32, 1, 2] = getitem(tokens_to_heads, 0)
    getitem_2: f32[1, 32, 1, 2] = getitem(tokens_to_heads, 1)
    getitem_3: f32[1, 32, 1, 2] = getitem(tokens_to_heads, 2)
    block_causal_attention_1: f32[1, 32, 1, 2] = \
lltk.block_causal_attention.default(getitem_1, getitem_2, getitem_3, 8, True, 2)
    heads_to_tokens: (f32[1, 16, 2, 2],) = \
lltk.heads_to_tokens.default([block_causal_attention_1], 2, 'sequence')
    getitem_4: f32[1, 16, 2, 2] = getitem(heads_to_tokens, 0)
    # root
    chunk: (f32[1, 8, 2, 2], f32[1, 8, 2, 2],) = aten.chunk.default(getitem_4, 2, 1)
    getitem: f32[1, 8, 2, 2] = getitem(chunk, 1)
    return {'sample': getitem}
"""
STEPS = (*CANONICAL, "text_per_chunk", "teacher_forcing")


def made() -> Program:
    return hand_made("train", Stage.CAUSAL, {"train": BEFORE}, height=64, width=64, frames=4)


def test_rewrites_the_text() -> None:
    program = after(made(), "balanced_sp")
    assert text(program, "train") == AFTER.strip()
    assert program.fact(Ranks).count == 2
    assert program.log[-1].matches == {"inputs": 5, "self-attention": 1}


def test_a_rank_has_whole_chunks_of_every_input() -> None:
    program = after(reached("train", *STEPS, frames=12), {"balanced_sp": {"size": 2}})
    contract = program.contract("train")
    assert {name: spec.shape for name, spec in contract.inputs.items()} == {
        "noisy": (1, 4, 6, 4, 4),
        "timestep": (1, 6),
        "encoder_hidden_states": (1, 3, 5, 16),
        "positions": (6,),
        "clean": (1, 4, 6, 4, 4),
    }
    assert contract.outputs["sample"].shape == (1, 4, 6, 4, 4)


def test_one_rank_leaves_the_graph_as_it_is() -> None:
    before = after(reached("train", *STEPS), {"balanced_sp": {"size": 1}})
    assert text(before, "train") == text(reached("train", *STEPS), "train")
    assert before.stage is Stage.PARTITIONED and before.fact(Ranks).count == 1


def quantised(size: int, **sizes: int) -> Program:
    """With linears in NVFP4; 4 tokens a frame, and 16 a prompt by default."""
    sizes = {"frames": 16, "text_tokens": 16, "layers": 1, "head_dim": 16} | sizes
    return after(reached("train", *STEPS, **sizes), "nvfp4_train", {"balanced_sp": {"size": size}})


def test_linears_in_nvfp4_round_as_on_one_rank() -> None:
    program = quantised(2)
    graph = program.graphs["train"]
    linears = calls(graph, torch.ops.lltk.nvfp4_linear.default)
    assert program.log[-1].matches["linears in NVFP4"] == len(linears) == 10
    for node in linears:
        run = 64 if "attn2.to_k" in module_of(node) or "attn2.to_v" in module_of(node) else 32
        assert node.args[-3:] == (run, 2, "sequence")
        assert shape(node.args[13]) == (4,)
    rows = calls(graph, torch.ops.lltk.nvfp4_quantise.default)
    turned = calls(graph, torch.ops.lltk.nvfp4_quantise_transposed.default)
    found = calls(graph, torch.ops.lltk.all_max.default)
    assert len(rows) == len(turned) == len(found) == 7, "of each x"
    for index, nodes in enumerate((rows, turned)):
        for node, largest in zip(nodes, found, strict=True):
            assert node.args[-1].args == (largest, 0, index)
    one = quantised(1)
    assert not calls(one.graphs["train"], torch.ops.lltk.all_max.default)


def test_a_gradient_is_exchanged_as_x_is() -> None:
    """Also where a block is computed: its largest magnitudes are those of all ranks."""
    program = after(quantised(2), "regionalise")
    with alike():
        joint = joint_graph(program.regions["train_block"])
    targets = [str(node.target) for node in joint.nodes]
    assert targets.count("lltk.all_max.default") == 6 + 10, "prompts are quantised outside"
    stochastic = [
        node
        for node in joint.nodes
        if "nvfp4_quantise" in str(node.target) and node.args[3] is not None
    ]
    assert len(stochastic) == 20 and all(node.args[-1] in (32, 64) for node in stochastic)


def test_what_is_sent_may_be_rounded() -> None:
    """Queries, keys and values, and what attention gives."""
    program = after(made(), {"balanced_sp": {"exchange": "fp8"}})
    sent = [str(op) for op in (TOKENS_TO_HEADS, HEADS_TO_TOKENS)]
    wanted = AFTER.strip().replace("], 2, 'sequence')", "], True, 'fp8', 2, 'sequence')", 1)
    wanted = wanted.replace("], 2, 'sequence')", "], False, 'fp8', 2, 'sequence')")
    for op in sent:
        name = op.split(".")[1]
        wanted = wanted.replace(op, "lltk.rounded_exchange.default")
        wanted = wanted.replace(name, {sent[0]: "rounded_exchange"}.get(op, "rounded_exchange_1"))
    assert text(program, "train") == wanted


def test_heads_that_are_no_blocks_are_not_sent_in_nvfp4() -> None:
    program = reached("train", *STEPS, frames=8)
    message = refused(after, program, {"balanced_sp": {"exchange": "nvfp4"}})
    assert message == (
        "balanced_sp: exchange: nvfp4 is for heads of whole blocks of 16, and the model's are 12 "
        "wide; set fp8 or compute"
    )


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({"frames": 12}, "blocks.0.attn1.to_q would have runs of 24 rows on each of 2 ranks, which "
                         "are not whole blocks of 16 in NVFP4; set geometry.frames to 8 or 16"),
        ({"frames": 8, "text_tokens": 5},
         "blocks.0.attn2.to_k would have runs of 10 rows on each of 2 ranks, which are not whole "
         "blocks of 16 in NVFP4; set geometry.frames to 64"),
    ],
)  # fmt: skip
def test_runs_that_cut_blocks_are_refused(sizes: dict[str, int], wanted: str) -> None:
    message = refused(quantised, 2, **sizes)
    exclude = ", or exclude it with nvfp4_train.exclude"
    assert message == f"balanced_sp: size: {wanted}{exclude}"


@pytest.mark.parametrize(
    ("frames", "size", "wanted"),
    [
        (6, 2, "2 ranks cannot share 6 latent frames in chunks of 2 evenly; set geometry.frames "
               "to 4 or 8"),
        (2, 2, "2 ranks cannot share 2 latent frames in chunks of 2 evenly; set geometry.frames "
               "to 4"),
        (6, 3, "3 ranks cannot share 2 heads evenly; set a size that can (1, 2)"),
    ],
)  # fmt: skip
def test_ranks_that_cannot_share_are_refused(frames: int, size: int, wanted: str) -> None:
    program = reached("train", *STEPS, frames=frames)
    message = refused(after, program, {"balanced_sp": {"size": size}})
    assert message == f"balanced_sp: size: {wanted}"


def test_one_prompt_for_the_clip_is_refused() -> None:
    """Its text is [B, S, E], and ranks would divide S; one rank may have it."""
    steps = [step for step in STEPS if step != "text_per_chunk"]
    program = reached("train", *steps, frames=12, text_tokens=6)
    message = refused(after, program, {"balanced_sp": {"size": 2}})
    assert message.startswith("balanced_sp: needs a prompt a chunk")
    assert "put text_per_chunk before teacher_forcing" in message
    after(program, {"balanced_sp": {"size": 1}})


def test_a_program_that_streams_is_refused() -> None:
    message = refused(after, reached("stream", *CANONICAL), "balanced_sp")
    assert message.startswith("balanced_sp: is for train and score programs, this one")
