"""bounded_positions: pages hold keys before RoPE, which are turned when they are read."""

from __future__ import annotations

import pytest
import torch
from helpers import PASSES, after, difference, inputs, reached, refused, run
from torch import Tensor

from lltk.graph.contract import Role
from lltk.graph.edit import calls
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.ops.nvfp4_decode_pages.reference import nvfp4_decode_pages
from lltk.ops.rope_table.reference import rope_table

pytestmark = pytest.mark.cpu

STREAM = PASSES["stream"][:6]


def turned(program: Program, heads: Tensor, positions: Tensor) -> Tensor:
    """Pages [B, P, T, H, D] turned by their frames' positions, as complex numbers."""
    spec, geometry = program.spec, program.geometry
    cos, sin = rope_table(positions, *geometry.grid(spec), spec.rope_split, spec.rope_theta)
    angle = torch.complex(cos[..., 0::2], sin[..., 0::2]).to(torch.complex128)
    flat = heads.flatten(1, 2).double().unflatten(-1, (-1, 2)).contiguous()
    made = torch.view_as_real(torch.view_as_complex(flat) * angle).flatten(-2)
    return made.unflatten(1, heads.shape[1:3]).to(heads.dtype)


@pytest.mark.parametrize("graph", ["step", "commit"])
def test_keys_are_turned_by_the_positions_of_their_pages(graph: str) -> None:
    """The same as turning the pages by hand, and giving them to the graph that expects it."""
    plain = reached("stream", *STREAM)
    program = after(plain, "bounded_positions")
    given = inputs(program, graph)
    positions = torch.tensor([0, 1, 9.5, 10.5, 4, 5, 100, 101], dtype=torch.float64)
    given |= {"page_positions": positions, "positions": torch.tensor([12.0, 13]).double()}
    by_hand = {
        name: turned(plain, value, positions) if name.startswith("k_pages") else value
        for name, value in given.items()
        if name != "page_positions"
    }
    ours, wanted = run(program, graph, given), run(plain, graph, by_hand)
    read = [name for name in wanted if not name.startswith("k_pages")]
    assert read and difference({n: ours[n] for n in read}, {n: wanted[n] for n in read}) < 1e-5
    moved = run(program, graph, {**given, "page_positions": positions + 3})
    assert difference({n: moved[n] for n in read}, {n: ours[n] for n in read}) > 1e-3


def test_the_commit_writes_keys_before_rope() -> None:
    """They do not depend on the chunk's position in the first layer, and are turned by it else."""
    plain = reached("stream", *STREAM)
    program = after(plain, "bounded_positions")
    given = inputs(program, "commit")
    far = {**given, "positions": given["positions"] + 5}
    page = "k_pages_0"
    ours, moved = (run(program, "commit", each)[page] for each in (given, far))
    assert torch.equal(ours, moved)
    slot = int(given["slot"])
    own = torch.zeros(8, dtype=torch.float64)
    own[2 * slot : 2 * slot + 2] = far["positions"]
    wanted = run(plain, "commit", {n: v for n, v in far.items() if n != "page_positions"})[page]
    by_hand = turned(plain, ours, own)[:, slot]
    assert difference({"k": by_hand}, {"k": wanted[:, slot]}) < 1e-5
    assert difference({"k": ours[:, slot]}, {"k": wanted[:, slot]}) > 0.1
    values = run(plain, "commit", {n: v for n, v in far.items() if n != "page_positions"})
    assert torch.equal(run(program, "commit", far)["v_pages_0"], values["v_pages_0"])


@pytest.mark.parametrize("smoothing", [True, False])
def test_pages_in_nvfp4_are_decoded_and_then_turned(smoothing: bool) -> None:
    cache = {"nvfp4_cache": {"smoothing": smoothing}}
    quantised = after(reached("stream", *STREAM, head_dim=16), cache)
    program = after(quantised, "bounded_positions")
    plain = after(reached("stream", *STREAM, head_dim=16), "bounded_positions")
    given = inputs(program, "step")
    decoded = {n: v for n, v in given.items() if "pages_" not in n}
    for side in "kv":
        for layer in range(2):
            parts = (
                given.get(f"{side}_pages_{part}_{layer}")
                for part in ("codes", "scales", "decode_scales", "means")
            )
            decoded[f"{side}_pages_{layer}"] = nvfp4_decode_pages(*parts)
    assert difference(run(program, "step", given), run(plain, "step", decoded)) < 1e-5
    assert not calls(program.graphs["step"], torch.ops.lltk.nvfp4_paged_attention.default)


@pytest.mark.parametrize("before", [(), ("merge_qkv",), ("fp8_infer",), ("lora",)])
def test_it_fits_the_other_passes(before: tuple[str, ...]) -> None:
    """Norms and rotations are fused after it, in all blocks but the commit's last."""
    program = reached("stream", *STREAM, *before, "bounded_positions", head_dim=16)
    assert program.log[-1].matches == {"self-attention": 3, "pages of keys": 2}
    fused = after(program, "fuse_norm_rope")
    assert fused.log[-1].matches == {"norms and rotations": 6}
    lowered = after(fused, "regionalise", "lower")
    for graph in ("step", "commit"):
        given = inputs(program, graph)
        assert difference(run(lowered, graph, given), run(program, graph, given)) < 1e-5


def test_pages_are_read_in_place() -> None:
    """What puts the chunk in flight in the free page puts its keys in the turned copy."""
    program = reached("stream", *STREAM, "bounded_positions", "regionalise")
    given = inputs(program, "step")
    arena = run(after(program, {"lower": {"paged_attention": "arena"}}), "step", given)
    assert {name for name in arena if "pages" in name} == {"v_pages_0", "v_pages_1"}
    wanted = run(after(program, "lower"), "step", given)
    assert difference({"sample": arena["sample"]}, wanted) < 1e-5


@torch.no_grad()
def test_blocks_compile() -> None:
    program = reached("stream", *STREAM, "bounded_positions", "regionalise", "lower")
    given = inputs(program, "step")
    wanted = run(program, "step", given)["sample"]
    module = instantiate(program)
    module.compile_blocks(backend="aot_eager")
    assert torch.equal(module("step", dict(given))["sample"], wanted)


def test_the_contract_has_the_pages_positions() -> None:
    program = reached("stream", *STREAM, "bounded_positions")
    assert program.turns_pages and not reached("stream", *STREAM).turns_pages
    for graph in ("step", "commit"):
        spec = program.contract(graph).input(Role.PAGE_POSITIONS)
        assert (spec.shape, spec.dtype) == ((8,), torch.float64)
    assert not program.contract("prologue").having(Role.PAGE_POSITIONS)


# Refusals


def test_keys_that_are_turned_in_another_way_are_refused() -> None:
    message = refused(after, reached("stream", *STREAM, "fuse_norm_rope"), "bounded_positions")
    assert message.startswith("bounded_positions: paged_attention (blocks.0.attn1")
    assert "move bounded_positions before the pass that changed that, such as fuse_norm_rope" in (
        message
    )


def test_a_pass_that_reads_pages_by_itself_is_refused() -> None:
    steps = (*STREAM, "nvfp4_cache", "fp8_infer", "fuse_attention_quantise")
    message = refused(after, reached("stream", *steps, head_dim=16), "bounded_positions")
    assert "fp8_quantise_attention.default reads pages by itself; remove the pass" in message
    bounded = reached("stream", *steps[:-1], "bounded_positions", head_dim=16)
    message = refused(after, bounded, "fuse_attention_quantise")
    assert message.startswith("fuse_attention_quantise: pages are turned before attention reads")
    assert "remove it, or bounded_positions, from the recipe's passes" in message


def test_kernels_for_pages_in_nvfp4_are_refused_by_name() -> None:
    bounded = reached(
        "stream", *STREAM, "nvfp4_cache", "bounded_positions", "regionalise", head_dim=16
    )
    message = refused(after, bounded, {"lower": {"nvfp4_paged_attention": "decode_triton"}})
    assert message.startswith("lower: nvfp4_paged_attention: there is no such op to choose for")


def test_nvfp4_after_it_is_refused() -> None:
    bounded = reached("stream", *STREAM, "bounded_positions", head_dim=16)
    assert refused(after, bounded, "nvfp4_cache") == (
        "nvfp4_cache: pages are turned before attention reads them; move bounded_positions behind "
        "it in the recipe"
    )


def test_exported_graphs_are_refused() -> None:
    bounded = reached("stream", *STREAM, "bounded_positions")
    assert refused(after, bounded, "externalise") == (
        "externalise: exported graphs are given the positions of the chunk in flight alone, not "
        "those of pages; remove bounded_positions from the recipe's passes"
    )


def test_tables_that_no_positions_give_are_refused() -> None:
    steps = ("canonicalise", "per_frame_timesteps", "hoist_text", "cached_step", "commit")
    assert refused(after, reached("stream", *steps), "bounded_positions") == (
        "bounded_positions: nothing computes rotary tables from positions; put frame_positions "
        "before it in the recipe"
    )
