"""Attention that reads the cache's arena itself, in its own dtype or in FP8."""

from __future__ import annotations

import pytest
import torch
from test_ops import ANY_DTYPE, BOUND, FAR, TABLES, dense_paged, page_operands, worst
from torch import Tensor

from lltk.ops.floats import to_e4m3
from lltk.ops.fp8_attention.op import fp8_attention
from lltk.ops.fp8_attention.reference import largest
from lltk.ops.implementations import find_implementation
from lltk.ops.paged_attention.arena import arena, fp8_arena
from lltk.ops.write_page.op import write_page

cpu = pytest.mark.cpu
gpu = pytest.mark.gpu


def rounded(x: Tensor) -> Tensor:
    """A tensor's values in E4M3."""
    return to_e4m3(x).to(x.dtype)


def in_fp8(dtype: torch.dtype, table: list[int], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """FP8 attention's result on a CPU, and exact attention of the same operands."""
    (q, k, v, _), arenas = page_operands(dtype, tokens=64, width=16)
    v, arenas[1] = v * scale, arenas[1] * scale
    exact = dense_paged(*(t.double() for t in (q, k, v, *arenas)), table)
    pages = [to_e4m3(pages) for pages in arenas]
    return fp8_arena(q, k, v, *pages, torch.tensor(table, dtype=torch.int64)), exact


def error(ours: Tensor, wanted: Tensor) -> float:
    """Standard error, relative."""
    return float((ours.double() - wanted).std() / wanted.std())


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
@pytest.mark.parametrize("table", [[], [2], [3, 0, 1]])
@pytest.mark.parametrize("scale", [0.05, 1.0, 100.0])
def test_fp8_attention_is_near_the_exact(table: list[int], scale: float) -> None:
    ours, exact = in_fp8(torch.float32, table, scale)
    assert 1e-3 < error(ours, exact) < 0.2
    assert error(ours.roll(1, 1), exact) > 0.5


@cpu
def test_fp8_attention_is_its_formula() -> None:
    """Exact attention of rounded operands, but for one rounding of the result."""
    (q, k, v, _), arenas = page_operands(torch.float64, tokens=32, width=16)
    pages = [to_e4m3(pages) for pages in arenas]
    ours = fp8_arena(q, k, v, *(p.clone() for p in pages), torch.tensor([0, 1, 3]))
    theirs = dense_paged(*(rounded(t) for t in (q, k, v)), *(p.double() for p in pages), [0, 1, 3])
    assert float(((ours - theirs).abs() / theirs.abs().clamp_min(1e-2)).max()) <= 2**-4 + 1e-3
    assert error(ours, theirs) > 1e-3


@cpu
def test_what_is_not_finite_is_seen() -> None:
    (q, k, v, _), arenas = page_operands(torch.float32)
    v[0, 0, 0, 0] = torch.nan
    ours = fp8_arena(q, k, v, *(to_e4m3(p) for p in arenas), torch.tensor([0]))
    assert ours.isnan().all(), "the scale of the result is NaN"
    assert float(largest(to_e4m3(torch.tensor([-500.0, 3.0])))) == 448
    assert not fp8_arena(q, k, 0 * k, *(to_e4m3(0 * p) for p in arenas), torch.tensor([0])).any()


@cpu
def test_pages_in_e4m3_saturate() -> None:
    pages = torch.zeros(1, 2, 3, 1, 2, dtype=torch.float8_e4m3fn)
    value = torch.tensor([[500.0, -1e9], [0.3, torch.nan], [448.0, 2**-9]]).view(1, 3, 1, 2)
    write_page(pages, value, torch.tensor([1]))
    written = pages.float()[0, 1, :, 0]
    wanted = torch.tensor([[448.0, -448.0], [0.3125, torch.nan], [448.0, 2**-9]])
    assert torch.equal(written.nan_to_num(-1), wanted.nan_to_num(-1))
    assert not pages.float()[0, 0].any()


@cpu
def test_opcheck() -> None:
    q, k = to_e4m3(torch.randn(1, 5, 2, 16)), to_e4m3(torch.randn(1, 9, 2, 16))
    checks = ("test_faketensor", "test_aot_dispatch_dynamic")  # others compare with allclose
    torch.library.opcheck(fp8_attention, (q, k, k, torch.tensor(3.0)), test_utils=checks)
    with pytest.raises(RuntimeError):
        fp8_attention(*(t.to("meta") for t in (q, k, q)), torch.tensor(3.0, device="meta"))


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


@gpu
@pytest.mark.parametrize("table", [[2], [3, 0, 1]])
@pytest.mark.parametrize("name", ["cudnn_arena", "fp8_arena"])
def test_arenas_on_cuda(name: str, table: list[int]) -> None:
    run = find_implementation("paged_attention", name).load()
    (q, k, v, _), arenas = page_operands(torch.bfloat16, tokens=256, width=128)
    exact = dense_paged(*(t.double() for t in (q, k, v, *arenas)), table)
    fp8 = name == "fp8_arena"
    pages = [to_e4m3(p).cuda() if fp8 else p.cuda() for p in arenas]
    moved = [*(t.cuda() for t in (q, k, v)), *pages, torch.tensor(table).cuda()]
    with torch.no_grad():
        ours = run(*moved).cpu()
        compiled = torch.compile(run)(*moved).cpu()
    assert error(ours, exact) < (0.2 if fp8 else 0.01)
    assert error(compiled, exact) < (0.2 if fp8 else 0.01)
    assert error(ours.roll(1, 1), exact) > 0.5
