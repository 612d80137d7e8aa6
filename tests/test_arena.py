"""Attention that reads the cache's arena itself."""

from __future__ import annotations

import pytest
import torch
from helpers import PASSES, make_program, make_recipe, tiny_config
from test_gpu import rollout
from test_ops import ANY_DTYPE, BOUND, FAR, TABLES, dense_paged, page_operands, worst
from torch import Tensor

from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.ops.implementations import find_implementation
from lltk.ops.paged_attention.arena import paged_attention as arena
from lltk.stream.rollout import Rollout

cpu = pytest.mark.cpu
gpu = pytest.mark.gpu


@cpu
@pytest.mark.parametrize("dtype", ANY_DTYPE)
@pytest.mark.parametrize("table", [*TABLES, [0, 1, 3], [1, 2, 3], [0, 1, 2, 3]])
def test_an_arena_is_attended_to_as_pages_are(table: list[int], dtype: torch.dtype) -> None:
    own, arenas = page_operands(dtype)
    ours = arena(*own[:3], *(t.clone() for t in arenas), torch.tensor(table, dtype=torch.int64))
    theirs = dense_paged(*own[:3], *arenas, table)
    assert ours.dtype == dtype and worst([ours], [theirs]) <= BOUND[dtype]
    assert worst([ours], [dense_paged(*own[:3], *arenas, table[1:])]) > FAR or not table


@cpu
@pytest.mark.parametrize("table", [[], [1], [3, 0, 1], [0, 2, 1]])
def test_committed_pages_keep_their_bytes(table: list[int]) -> None:
    own, arenas = page_operands(torch.float32)
    held = [pages.clone() for pages in arenas]
    arena(*own[:3], *held, torch.tensor(table, dtype=torch.int64))
    changed = [p for p in range(4) if not torch.equal(held[0][:, p], arenas[0][:, p])]
    assert changed == ([] if len(table) < 3 else sorted({0, 1, 2, 3} - set(table)))
    for page in changed:
        assert torch.equal(held[0][:, page], own[1]) and torch.equal(held[1][:, page], own[2])


@cpu
def test_pages_of_another_dtype_are_copied() -> None:
    """So the chunk's own keys and values are not rounded to the dtype of the pages."""
    own, arenas = page_operands(torch.float32)
    held, table = [pages.bfloat16() for pages in arenas], [3, 0, 1]
    ours = arena(*own[:3], *held, torch.tensor(table))
    theirs = dense_paged(*own[:3], *(pages.float() for pages in held), table)
    assert worst([ours], [theirs]) <= BOUND[torch.float32]
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(held, arenas, strict=True))


@cpu
def test_an_arena_takes_no_gradients() -> None:
    own, arenas = page_operands(torch.float32)
    inputs = [t.requires_grad_() for t in own[:3]]
    run = arena(*inputs, *arenas, torch.tensor([0, 1]))
    run.sum().backward()
    assert all(t.grad is not None for t in inputs), "pages are copied here"
    pages = [t.requires_grad_() for t in arenas]
    with pytest.raises(RuntimeError, match="in-place"):
        arena(*inputs, *pages, torch.tensor([0, 1, 2]))


@cpu
def test_an_arena_compiles() -> None:
    own, arenas = page_operands(torch.float32)
    held = [[t.clone() for t in arenas] for _ in range(2)]
    table = torch.tensor([3, 0, 1])
    with torch.no_grad():
        compiled = torch.compile(arena, fullgraph=True, backend="aot_eager")(
            *own[:3], *held[0], table
        )
        eager = arena(*own[:3], *held[1], table)
    assert worst([compiled], [eager]) <= BOUND[torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))


def streaming(attention: str) -> Program:
    steps = [*PASSES["stream"][:-1], {"lower": {"paged_attention": attention}}]
    config = tiny_config(2, num_attention_heads=2, attention_head_dim=16)
    sizes = {"height": 64, "width": 64, "chunk": 2, "window": 8, "sink": 2}
    return make_program(make_recipe("stream", steps, config=config, **sizes))


@cpu
def test_a_stream_through_arenas_is_the_plain_one() -> None:
    wanted, ours = rollout(streaming("reference"), "cpu"), rollout(streaming("arena"), "cpu")
    assert worst([ours], [wanted]) <= BOUND[torch.float32]
    assert worst([ours.roll(1, 0)], [wanted]) > FAR


@cpu
def test_a_state_goes_on_bit_for_bit() -> None:
    """What a step left in the free page does not matter."""
    program = streaming("arena")
    runs = [Rollout(program, instantiate(program)) for _ in range(2)]
    geometry, spec = program.geometry, program.spec
    latents = torch.randn(1, spec.channels, geometry.chunk, *geometry.latent(spec))
    positions = torch.arange(geometry.chunk, dtype=torch.float64)
    level = torch.full((1, geometry.chunk), 500.0)
    text = torch.randn(1, geometry.text_tokens, spec.text_dim)
    with torch.no_grad():
        for run in runs:
            run.set_text(text)
        for _ in range(3):
            runs[0].commit(latents, positions)
        runs[0].step(latents + 1, level, positions)
        runs[1]._runtime.restore({n: p.clone() for n, p in runs[0].pages.items()})
        runs[1].table.restore(runs[0].table.state)
        one, other = (run.step(latents, level, positions) for run in runs)
        assert torch.equal(one, other)
        assert not torch.equal(one, runs[1].step(latents + 1, level, positions))


def error(ours: Tensor, wanted: Tensor) -> float:
    """The standard error, relative to what is wanted."""
    return float((ours.double() - wanted).std() / wanted.std())


@gpu
@pytest.mark.parametrize("table", [[2], [3, 0, 1]])
def test_an_arena_on_cuda(table: list[int]) -> None:
    run = find_implementation("paged_attention", "arena").load()
    (q, k, v, _), arenas = page_operands(torch.bfloat16, tokens=256, width=128)
    exact = dense_paged(*(t.double() for t in (q, k, v, *arenas)), table)
    moved = [*(t.cuda() for t in (q, k, v, *arenas)), torch.tensor(table).cuda()]
    with torch.no_grad():
        ours = run(*moved).cpu()
        compiled = torch.compile(run)(*moved).cpu()
    assert error(ours, exact) < 0.01
    assert error(compiled, exact) < 0.01
    assert error(ours.roll(1, 1), exact) > 0.5
