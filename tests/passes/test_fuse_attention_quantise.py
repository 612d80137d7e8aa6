"""fuse_attention_quantise: attention over NVFP4 pages and what quantises it become one op."""

from __future__ import annotations

import pytest
import torch
from helpers import after, inputs, reached, refused, run, same, text

from lltk.graph.edit import calls, output
from lltk.graph.program import Program
from lltk.ops.fp8_quantise.op import OVERLOAD as QUANTISE
from lltk.ops.fp8_quantise_attention.op import OVERLOAD as QUANTISE_ATTENTION
from lltk.ops.nvfp4_paged_attention.op import OVERLOAD as ATTENTION

pytestmark = pytest.mark.cpu

CAUSAL = (
    "canonicalise", "per_frame_timesteps", "frame_positions", "hoist_text", "cached_step", "commit",
)  # fmt: skip


def made(dtype: str = "float32") -> Program:
    return reached("stream", *CAUSAL, "nvfp4_cache", "fp8_infer", dtype=dtype, head_dim=16)


def test_what_is_rewritten() -> None:
    """Every block's attention to pages but the commit's last, whose result nothing reads."""
    program = after(made(), "fuse_attention_quantise")
    layers = made().spec.layers
    assert program.log[-1].matches == {"self-attention": 2 * layers - 1}
    for name, count in (("step", layers), ("commit", layers - 1)):
        graph = program.graphs[name]
        fused = calls(graph, QUANTISE_ATTENTION)
        assert len(fused) == count
        assert not {node.target for node in graph.nodes} & {ATTENTION}
        assert [tuple(part.shape) for part in fused[0].meta["val"]] == [
            tuple(part.shape) for part in calls(graph, QUANTISE)[0].meta["val"]
        ]
    assert "lltk.fp8_quantise_attention.default(" in text(program, "step")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_stay(dtype: str) -> None:
    plain = made(dtype)
    program = after(plain, "fuse_attention_quantise")
    given = inputs(plain, "step")
    wanted = run(plain, "step", given)
    assert same(run(program, "step", given), wanted)
    given["hidden_states"] = 1.1 * given["hidden_states"]
    assert not same(run(program, "step", given), wanted)


@pytest.mark.parametrize("what", ["read twice", "heads apart", "pages in bfloat16"])
def test_others_stay(what: str) -> None:
    program = made()
    if what == "pages in bfloat16":
        program = reached("stream", *CAUSAL, "fp8_infer", head_dim=16)
    for graph in program.graphs.values():
        for node in calls(graph, torch.ops.aten.flatten.using_ints):
            if what == "heads apart" and node.args[0].target is ATTENTION:
                node.args = (node.args[0], 1, 3)
        for node in calls(graph, ATTENTION):
            if what == "read twice":
                end = output(graph)
                end.args = ({**end.args[0], node.name: node},)
    message = refused(after, program, "fuse_attention_quantise")
    assert "quantises no attention over pages that it alone reads" in message
