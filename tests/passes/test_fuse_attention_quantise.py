"""fuse_attention_quantise: attention over NVFP4 pages and what quantises it become one op."""

from __future__ import annotations

import pytest
import torch
from helpers import after, compare_results, reached, refused, text

from lltk.graph.edit import calls, output
from lltk.graph.memory import activations, estimate
from lltk.graph.program import Program
from lltk.ops.implementations import overload

QUANTISE_ATTENTION = overload("fp8_quantise_attention")
ATTENTION = overload("nvfp4_paged_attention")
DECODE_PAGE = overload("fp8_decode_page")
ROW_PIPELINE = overload("row_pipeline")

pytestmark = pytest.mark.cpu

CAUSAL = (
    "canonicalise", "per_frame_timesteps", "frame_positions", "hoist_text", "cached_step", "commit",
)  # fmt: skip


def made(dtype: str = "float32") -> Program:
    return reached("stream", *CAUSAL, "nvfp4_cache", "fp8_infer", dtype=dtype, head_dim=16)


def test_what_is_rewritten() -> None:
    """Every block's attention to pages is, but the commit's last, whose result nothing reads."""
    program = after(made(), "fuse_attention_quantise")
    layers = made().spec.layers
    assert program.log[-1].matches == {"self-attention": 2 * layers - 1}
    for name, count in (("step", layers), ("commit", layers - 1)):
        graph = program.graphs[name]
        fused = calls(graph, QUANTISE_ATTENTION)
        assert len(fused) == count
        assert not {node.target for node in graph.nodes} & {ATTENTION}
        assert [tuple(part.shape) for part in fused[0].meta["val"]] == [
            tuple(part.shape) for part in calls(graph, ROW_PIPELINE)[0].meta["val"]
        ]
    assert "lltk.fp8_quantise_attention.default(" in text(program, "step")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_stay(dtype: str) -> None:
    plain = made(dtype)
    program = after(plain, "fuse_attention_quantise")
    compare_results(plain, program, "step", "hidden_states", lambda latents: 1.1 * latents)


KEPT = {"fuse_attention_quantise": {"keep_decoded": True}}


def rotated(dtype: str = "float32") -> Program:
    steps = (*CAUSAL, "fuse_norm_rope", "nvfp4_cache", "fp8_infer")
    return reached("stream", *steps, dtype=dtype, head_dim=16)


def test_pages_that_are_kept_decoded() -> None:
    """A commit decodes what it writes, attention is given it, and queries come in E4M3."""
    program = after(rotated(), KEPT)
    layers = program.spec.layers
    assert program.log[-1].matches["pages that are kept decoded"] == 2 * layers
    written = calls(program.graphs["commit"], DECODE_PAGE)
    assert [str(node.args[0]) for node in written[:2]] == ["k_pages_decoded_0", "v_pages_decoded_0"]
    (first, *_) = calls(program.graphs["step"], QUANTISE_ATTENTION)
    assert [str(node) for node in first.args[-4:]] == [
        "k_pages_decoded_0", "k_pages_largest_0", "v_pages_decoded_0", "v_pages_largest_0",
    ]  # fmt: skip
    assert first.args[0].meta["val"].dtype == torch.float8_e4m3fn
    assert first.args[1].meta["val"].dtype == torch.float32
    plain = after(rotated(), "fuse_attention_quantise")
    spec, geometry = program.spec, program.geometry
    tokens = geometry.chunk * geometry.frame_tokens(spec)
    page = tokens * spec.heads * spec.head_dim + 4
    apart = estimate(program)["cache pages"] - estimate(plain)["cache pages"]
    assert apart == 2 * layers * geometry.batch * geometry.pages * page


def test_what_keeping_them_needs_is_said() -> None:
    causal = reached("stream", *CAUSAL, head_dim=16)
    program = after(causal, {"nvfp4_cache": {"smoothing": False}}, "fp8_infer")
    assert "remove it, or smoothing: false of nvfp4_cache" in refused(after, program, KEPT)
    program = reached("stream", *CAUSAL, "nvfp4_cache", "fp8_infer", head_dim=16, sink=0)
    assert "set geometry.sink, or remove keep_decoded" in refused(after, program, KEPT)


@pytest.mark.parametrize("what", ["read twice", "heads apart", "in high precision"])
def test_others_stay(what: str) -> None:
    program = after(made())
    if what == "in high precision":
        program = reached("stream", *CAUSAL, "nvfp4_cache", head_dim=16)
    for graph in program.graphs.values():
        for node in calls(graph, torch.ops.aten.flatten.using_ints):
            if what == "heads apart" and node.args[0].target is ATTENTION:
                node.args = (node.args[0], 1, 3)
        for node in calls(graph, ATTENTION):
            if what == "read twice":
                end = output(graph)
                end.args = ({**end.args[0], node.name: node},)
    message = refused(after, program, "fuse_attention_quantise")
    assert "is not read by a quantiser to FP8 alone; run fp8_infer before" in message


def test_pages_in_bfloat16_are_no_candidates() -> None:
    program = reached("stream", *CAUSAL, "fp8_infer", head_dim=16)
    assert "the graphs hold no candidate" in refused(after, program, "fuse_attention_quantise")


def test_heads_that_ranks_exchange_are_not_quantised_before() -> None:
    program = after(made(), "fuse_attention_quantise")
    message = refused(after, program, {"ulysses_stream": {"size": 2}})
    assert message.endswith("remove fuse_attention_quantise from the recipe's passes")


@pytest.mark.parametrize("fused", [False, True])
def test_pages_that_are_decoded_count_as_memory(fused: bool) -> None:
    """In FP8 keys and values take a byte an element.

    Others take the compute dtype, and a copy more.
    """
    lowered = {}
    for name in ("reference", "fp8_decode"):
        keys = ("nvfp4_paged_attention", "fp8_quantise_attention")
        steps = (*(["fuse_attention_quantise"] if fused else []), "regionalise")
        program = after(made("bfloat16"), *steps, {"lower": {keys[fused]: name}})
        lowered[name] = activations(program)
    spec, geometry = made().spec, made().geometry
    tokens = geometry.chunk * geometry.frame_tokens(spec)
    elements = geometry.pages * tokens * spec.heads * spec.head_dim
    assert lowered["reference"] - lowered["fp8_decode"] == (3 * 2 - 2) * elements
