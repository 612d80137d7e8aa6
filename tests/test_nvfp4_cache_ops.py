"""Pages in NVFP4: written once, read by attention as the values they decode to."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from typing import Any

import nvfp4_pages
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvfp4_pages import (
    PAGES,
    by_hand,
    compare_fp8,
    compare_kept,
    compare_kernels,
    compare_writing,
    kept,
    operands,
    written,
)
from test_ops import (
    ANY_DTYPE,
    BOUND,
    FAR,
    TABLES,
    dense,
    dense_paged_in,
    random,
    with_gradients,
    worst,
)
from torch import Tensor
from torch.library import opcheck

from lltk.ops.floats import round_e4m3
from lltk.ops.fp8_attention.op import fp8_attention
from lltk.ops.fp8_decode_page.op import fp8_decode_page
from lltk.ops.fp8_quantise_attention.fp8_decode_torch import (
    fp8_quantise_attention as quantised_fp8_decode,
)
from lltk.ops.fp8_quantise_attention.op import fp8_quantise_attention
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.fp8_write_own.op import fp8_write_own
from lltk.ops.implementations import find_implementation
from lltk.ops.nvfp4_decode_pages.op import nvfp4_decode_pages
from lltk.ops.nvfp4_gather_fp8.op import nvfp4_gather_fp8
from lltk.ops.nvfp4_listed_attention.op import nvfp4_listed_attention
from lltk.ops.nvfp4_paged_attention.fp8 import centre
from lltk.ops.nvfp4_paged_attention.fp8_decode_torch import nvfp4_paged_attention as fp8_decode
from lltk.ops.nvfp4_paged_attention.op import (
    nvfp4_paged_attention,
    nvfp4_paged_attention_backward,
)
from lltk.ops.nvfp4_paged_attention.reference import Pages, decode, empty_pages, gather
from lltk.ops.nvfp4_quantise.reference import RULES
from lltk.ops.nvfp4_quantise_page.op import nvfp4_quantise_page
from lltk.ops.nvfp4_write_page.op import nvfp4_write_page
from lltk.ops.paged_attention.reference import attention

cpu = pytest.mark.cpu
gpu = pytest.mark.gpu


def read(pages: Pages) -> Tensor:
    """Every page, decoded, as [B, P, T, H, D]."""
    _, count, tokens = pages.codes.shape[:3]
    return decode(pages, torch.arange(count)).unflatten(1, (count, tokens))


def raw(pages: Pages) -> list[Tensor]:
    """A copy of the arena's bytes, each part [B, P, …]."""
    return [part.contiguous().view(torch.uint8).clone() for part in pages if part is not None]


# Writing


@cpu
@given(
    st.integers(0, PAGES - 1),
    st.sampled_from(RULES),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    st.integers(2, 5),
)
@settings(max_examples=25)
def test_a_page_is_its_heads_quantised(
    slot: int, rule: str, smooth: bool, dtype: torch.dtype, tokens: int
) -> None:
    """It is so to the bit, and every other page keeps its bytes."""
    own, (values, _) = operands(dtype, tokens)
    pages = written(values, smooth, rule)
    assert torch.equal(read(pages), by_hand(values, smooth, rule))
    before = raw(pages)
    nvfp4_write_page(*pages, own[0], torch.tensor([slot]), rule)
    kept = [page for page in range(PAGES) if page != slot]
    for part, was in zip(raw(pages), before, strict=True):
        assert torch.equal(part[:, kept], was[:, kept])
        assert not torch.equal(part[:, slot], was[:, slot])
    wanted = by_hand(own[0].unsqueeze(1), smooth, rule)
    assert torch.equal(read(pages)[:, slot : slot + 1], wanted)
    assert not torch.equal(wanted, own[0].unsqueeze(1).float())


@cpu
def test_a_page_is_the_same_wherever_and_whenever_it_is_written() -> None:
    own, (values, _) = operands(torch.bfloat16)
    pages, other = written(values, True), written(values.flip(1), True)
    for slot, into in ((1, pages), (3, other), (1, pages)):
        nvfp4_write_page(*into, own[0], torch.tensor([slot]), "mse")
    for one, two in zip(raw(pages), raw(other), strict=True):
        assert torch.equal(one[:, 1], two[:, 3])
        assert not torch.equal(one[:, 1], two[:, 1])


@cpu
def test_a_mean_does_not_depend_on_the_order_of_its_sum() -> None:
    """In float32 the ones would be lost beside the large values that cancel out."""
    value = torch.ones(1, 64, 1, 16)
    value[:, 0], value[:, -1] = 2.0**26, -(2.0**26)
    for tokens in (value, value.roll(1, 1)):
        pages = empty_pages((1, 2, 64, 1, 16), True)
        nvfp4_write_page(*pages, tokens, torch.tensor([1]))
        assert pages.means is not None and bool((pages.means[:, 1] == 62 / 64).all())


@cpu
def test_heads_do_not_share_a_scale() -> None:
    """An outlier costs its own page and head only."""
    _, (values, _) = operands(torch.float32)
    loud = values.clone()
    loud[0, 2, 1, 1, 5] = 1e6
    quiet, disturbed = read(written(values, False)), read(written(loud, False))
    assert (quiet != disturbed)[0, 2, :, 1].any()
    disturbed[0, 2, :, 1] = quiet[0, 2, :, 1]
    assert torch.equal(quiet, disturbed)


@cpu
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_head(bad: float) -> None:
    _, (values, _) = operands(torch.float32)
    values[1, 2, 3, 0, 7] = bad
    for smooth in (False, True):
        decoded = read(written(values, smooth))
        assert decoded[1, 2, :, 0].isnan().all()
        decoded[1, 2, :, 0] = 0
        assert decoded.isfinite().all()


@cpu
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_any_size_survives(size: float) -> None:
    _, (values, _) = operands(torch.float32)
    for smooth in (False, True):
        decoded = read(written(values * size, smooth))
        assert float((decoded - values * size).abs().max()) <= 0.6 * size
        assert bool(decoded.any()) == bool(size)
    assert not read(empty_pages(values.shape, True)).any()


@cpu
def test_smoothing_halves_what_a_bias_costs() -> None:
    """Keys and values have a bias by channel. Four Over Six gains too, but less."""
    q = random((1, 96, 2, 64), torch.float32, 0)
    bias = 2 * random((1, 1, 2, 64), torch.float32, 1)
    keys, values = (random((1, 96, 2, 64), torch.float32, seed) + bias for seed in (2, 3))
    wanted = attention(q, keys, values)

    def cost(which: str, smooth: bool, rule: str) -> float:
        k, v = (
            read(written(t.unsqueeze(1), smooth, rule))[:, 0] if which == name else t
            for name, t in (("k", keys), ("v", values))
        )
        return float((attention(q, k, v) - wanted).norm() / wanted.norm())

    for which in ("k", "v"):
        plain, mse = cost(which, False, "none"), cost(which, False, "mse")
        assert cost(which, True, "none") < 0.5 * plain
        assert cost(which, True, "mse") < 0.95 * cost(which, True, "none")
        assert mse < 0.98 * plain


# Attention


@cpu
@pytest.mark.parametrize("dtype", ANY_DTYPE)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", ["reference", "decode"])
def test_attention_and_its_gradients(name: str, table: list[int], dtype: torch.dtype) -> None:
    """Attention is over the decoded pages. The chunk in flight is not quantised."""
    run = find_implementation("nvfp4_paged_attention", name).load()
    own, arenas = operands(dtype)
    k_pages, v_pages = written(arenas[0], True), written(arenas[1], False)
    listed = torch.tensor(table, dtype=torch.int64)
    ours = with_gradients(run, own, *k_pages, *v_pages, listed)
    assert all(t.dtype == dtype for t in ours)
    decoded = [by_hand(arenas[0], True), by_hand(arenas[1], False)]
    assert worst(ours, dense_paged_in(own, decoded, table)) <= BOUND[dtype]
    one_more = [*table, min({0, 1, 2, 3} - set(table))]
    assert worst(ours, dense_paged_in(own, decoded, one_more)) > FAR
    if table:
        assert worst(ours, dense_paged_in(own, arenas, table)) > FAR
        assert worst(ours, dense_paged_in(own, [decoded[0], arenas[1]], table)) > FAR
        assert worst(ours, dense_paged_in(own, [arenas[0], decoded[1]], table)) > FAR


@cpu
@pytest.mark.parametrize("name", ["reference", "decode"])
def test_half_precision(name: str) -> None:
    run = find_implementation("nvfp4_paged_attention", name).load()
    own, arenas = operands(torch.bfloat16)
    pages = [written(values, True) for values in arenas]
    ours = with_gradients(run, own, *pages[0], *pages[1], torch.tensor([1, 3]))
    decoded = [by_hand(values, True) for values in arenas]
    assert worst(ours, dense_paged_in(own, decoded, [1, 3])) <= BOUND[torch.bfloat16]


@cpu
@given(st.permutations(range(PAGES)), st.integers(0, PAGES), st.booleans())
@settings(max_examples=20)
def test_page_order_does_not_matter(order: list[int], count: int, smooth: bool) -> None:
    own, arenas = operands(torch.float64)
    pages = [written(values, smooth) for values in arenas]
    table = order[:count]
    for name in ("reference", "decode"):
        run = find_implementation("nvfp4_paged_attention", name).load()
        one, other = (
            with_gradients(run, own, *pages[0], *pages[1], torch.tensor(t, dtype=torch.int64))
            for t in (table, sorted(table))
        )
        assert worst(one, other) <= BOUND[torch.float64]


@cpu
@pytest.mark.parametrize("name", ["reference", "decode"])
def test_unlisted_pages_do_not_matter(name: str) -> None:
    run = find_implementation("nvfp4_paged_attention", name).load()
    own, arenas = operands(torch.float32)
    pages = [written(values, True) for values in arenas]
    table = torch.tensor([3, 1])
    before = run(*own[:3], *pages[0], *pages[1], table)
    for slot in (0, 2):
        for arena in pages:
            arena.codes[:, slot] ^= 0xFF
            arena.scales.view(torch.uint8)[:, slot] = 0x7F
            arena.decode_scales[:, slot] = torch.nan
            assert arena.means is not None
            arena.means[:, slot] = torch.inf
    assert torch.equal(run(*own[:3], *pages[0], *pages[1], table), before)
    assert run(*own[:3], *pages[0], *pages[1], torch.tensor([2, 1])).isnan().all()


@cpu
@pytest.mark.parametrize("name", ["reference", "decode"])
def test_committed_pages_are_constants(name: str) -> None:
    run = find_implementation("nvfp4_paged_attention", name).load()
    own, arenas = operands(torch.float32)
    pages = [written(values, True) for values in arenas]
    floats = [part for arena in pages for part in arena[2:] if part is not None]
    for part in (*floats, *own[:3]):
        part.requires_grad_()
    run(*own[:3], *pages[0], *pages[1], torch.tensor([0, 1])).sum().backward()
    assert all(t.grad is not None for t in own[:3])
    assert [part.grad for part in floats] == [None] * 4


def in_fp8(bias: float, smooth: bool, table: list[int]) -> tuple[float, float]:
    """Standard errors of attention in FP8, over values that have a bias by channel.

    The first is of attention that centres the values, the second of attention that does not. Both
    are relative to the spread of the results without the bias.
    """
    own, arenas = operands(torch.float32, 64, 16)
    shared = bias * random((1, 1, 1, arenas[1].shape[3], 16), torch.float32, 7)
    own[2], arenas[1] = own[2] + shared[0], arenas[1] + shared
    pages = [written(values, smooth) for values in arenas]
    listed = torch.tensor(table, dtype=torch.int64)
    rest = (*own[:3], *pages[0], *pages[1], listed)
    exact = nvfp4_paged_attention(*rest)
    raw_keys, raw_values = (
        round_e4m3(gather(t, p, listed, torch.float32))
        for t, p in zip(own[1:3], pages, strict=True)
    )
    scale = 448 / raw_values.float().abs().amax()
    plain = fp8_attention(round_e4m3(own[0]), raw_keys, raw_values, scale).float() / scale
    spread = (exact - shared[0]).std()
    return tuple(float((t - exact).std() / spread) for t in (fp8_decode(*rest), plain))


@cpu
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("table", [[], [2], [3, 0, 1]])
def test_attention_in_fp8(table: list[int], smooth: bool) -> None:
    """What the values of a channel have in common costs nothing."""
    ours, plain = in_fp8(0.0, smooth, table)
    assert 1e-3 < ours < 0.12 and plain < 0.12
    biased, plain = in_fp8(30.0, smooth, table)
    assert biased < 0.15 and plain > 3 * biased


@cpu
def test_keys_are_centred_too() -> None:
    own, arenas = operands(torch.float32, 64, 16)
    arenas[0], own[1] = arenas[0] + 20, own[1] + 20
    pages = [*written(arenas[0], True), *written(arenas[1], True)]
    rest = (*own[:3], *pages, torch.tensor([1, 3]))
    exact = nvfp4_paged_attention(*rest)
    assert float((fp8_decode(*rest) - exact).std() / exact.std()) < 0.1
    shifted = [own[0], own[1] + random(own[1].shape, torch.float32, 8)]
    other = fp8_decode(*shifted, *rest[2:])
    assert float((other - exact).std() / exact.std()) > 0.3


@cpu
@pytest.mark.parametrize("size", [0.01, 100.0])
def test_fp8_scales_its_result(size: float) -> None:
    """A mean of small values is smaller still, and E4M3 ends at 2⁻⁹."""
    own, arenas = operands(torch.float32, 64, 16)
    own[2], arenas[1] = own[2] * size, arenas[1] * size
    pages = [written(values, True) for values in arenas]
    rest = (*own[:3], *pages[0], *pages[1], torch.tensor([3, 0, 1]))
    exact = nvfp4_paged_attention(*rest)
    ours = fp8_decode(*rest)
    assert 1e-3 < float((ours - exact).std() / exact.std()) < 0.2
    assert float((ours.roll(1, 1) - exact).std() / exact.std()) > 0.5


@cpu
@pytest.mark.parametrize(("value", "rounded"), [(17.0, 16.0), (19.0, 20.0)])
def test_the_largest_value_is_not_rounded_twice(value: float, rounded: float) -> None:
    """The result's scale is that of the largest value as E4M3 has it, not as it was before.

    Each of two tokens attends to itself alone. A scale of 17 would give 15.8, one of 19 saturates.
    """
    _, arenas = operands(torch.float32, 2, 16)
    pages = [*written(arenas[0], False), *written(arenas[1], False)]
    sign = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(2, 2, nvfp4_pages.HEADS, 16)
    none = torch.tensor([], dtype=torch.int64)
    result = fp8_decode(8 * sign, 8 * sign, value * sign, *pages, none)
    assert float((result - rounded * sign).abs().max()) < 1e-5


@cpu
def test_fp8_of_nothing_is_nothing() -> None:
    own, arenas = operands(torch.float32)
    pages = [*written(arenas[0], True), *written(0 * arenas[1], True)]
    assert not fp8_decode(*own[:2], 0 * own[2], *pages, torch.tensor([1])).any()


@cpu
def test_fp8_attention_is_its_formula() -> None:
    """It is exact attention of its operands, scaled, and rounded once."""
    (q, k, v, _), _ = operands(torch.float32, 32, 16)
    given = [round_e4m3(t) for t in (q, k, v)]
    ours = fp8_attention(*given, torch.tensor(50.0)).double()
    theirs = 50 * dense(*(t.double() for t in given), torch.ones(32, 32, dtype=torch.bool))
    assert float(((ours - theirs).abs() / theirs.abs().clamp_min(2**-6)).max()) <= 2**-4 + 1e-3
    assert float((ours - theirs).std() / theirs.std()) > 1e-3


@cpu
@pytest.mark.parametrize("smooth", [False, True])
def test_its_result_may_be_quantised_at_once(smooth: bool) -> None:
    own, arenas = operands(torch.bfloat16, 64, 16)
    pages = [*written(arenas[0], smooth), *written(arenas[1], smooth)]
    rest = (*own[:3], *pages, torch.tensor([3, 0, 1]))
    for attend, quantised in (
        (fp8_decode, quantised_fp8_decode),
        (nvfp4_paged_attention, fp8_quantise_attention),
    ):
        values, scales = quantised(*rest)
        wanted, others = fp8_quantise(attend(*rest).flatten(2))
        assert torch.equal(values.float(), wanted.float()) and torch.equal(scales, others)
        assert not torch.equal(values.float(), wanted.roll(1, 1).float())


@cpu
@pytest.mark.parametrize("table", [[0, 1, 2], [0, 3, 1], [0, 2], []])
@pytest.mark.parametrize("rounded", [False, True])
def test_pages_that_are_kept_decoded_change_no_bit(table: list[int], rounded: bool) -> None:
    """All pages but one are read where they lie; fewer are decoded. Only the free page changes."""
    own, arenas = operands(torch.bfloat16, 64, 16)
    k_pages, v_pages = (written(arena, True) for arena in arenas)
    held = [*kept(k_pages), *kept(v_pages)]
    before = [part.view(torch.uint8).clone() for part in held]
    q = round_e4m3(own[0]) if rounded else own[0]
    rest = (q, *own[1:3], *k_pages, *v_pages, torch.tensor(table, dtype=torch.int64))
    wanted, found = quantised_fp8_decode(*rest), quantised_fp8_decode(*rest, *held)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    other = quantised_fp8_decode(*rest, *(part.roll(1, 1) for part in held))
    assert torch.equal(found[0].float(), other[0].float()) == (len(table) < PAGES - 1)
    changed = {
        page
        for part, was in zip(held, before, strict=True)
        for page in range(PAGES)
        if not torch.equal(part.view(torch.uint8)[:, page], was[:, page])
    }
    assert changed == (set(range(PAGES)) - set(table) if len(table) == PAGES - 1 else set())


@cpu
def test_own_values_that_are_not_finite_show() -> None:
    own, arenas = operands(torch.float32)
    k_pages, v_pages = (written(arena, True) for arena in arenas)
    own[2][0, 0, 0, 0] = torch.nan
    held = [*kept(k_pages), *kept(v_pages)]
    table = torch.tensor([0, 1, 2])
    assert fp8_write_own(
        held[0], held[2], held[3], *own[1:3], k_pages[3], v_pages[3], table
    ).isnan()
    values, scales = quantised_fp8_decode(*own[:3], *k_pages, *v_pages, table, *held)
    assert (values.float() * scales).isnan().all()


@cpu
@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_pages_that_are_kept_decoded() -> None:
    own, arenas = operands(torch.bfloat16)
    pages, table = written(arenas[0], True), torch.tensor([0, 1, 2])
    decoded, largest = kept(pages)
    checks = ("test_autograd_registration", "test_faketensor")
    opcheck(fp8_decode_page, (decoded, largest, *pages, table[:1]), test_utils=checks)
    given = (decoded, decoded.clone(), largest, *own[1:3], pages.means, pages.means)
    opcheck(fp8_write_own, (*given, table), test_utils=checks)
    with pytest.raises(RuntimeError):
        fp8_write_own(*(t.to("meta") for t in given if t is not None), table[:2].to("meta"))
    with pytest.raises(RuntimeError):
        meta = [t.to("meta") for t in (decoded, largest, *pages) if t is not None]
        fp8_decode_page(meta[0][..., 1:], *meta[1:], table[:1].to("meta"))


@cpu
def test_opcheck_of_fp8_attention() -> None:
    q, k = round_e4m3(torch.randn(1, 5, 2, 16)), round_e4m3(torch.randn(1, 9, 2, 16))
    checks = ("test_faketensor", "test_aot_dispatch_dynamic")  # others compare with allclose
    opcheck(fp8_attention, (q, k, k, torch.tensor(3.0)), test_utils=checks)
    with pytest.raises(RuntimeError):
        fp8_attention(*(t.to("meta") for t in (q, k, q)), torch.tensor(3.0, device="meta"))


@cpu
def test_fp8_shows_what_is_not_finite() -> None:
    own, arenas = operands(torch.float32)
    own[2][0, 0, 0, 0] = torch.nan
    pages = [*written(arenas[0], True), *written(arenas[1], True)]
    assert fp8_decode(*own[:3], *pages, torch.tensor([1])).isnan().all()


@cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("table", TABLES)
def test_opcheck_of_decoding_to_fp8(table: list[int]) -> None:
    own, arenas = operands(torch.bfloat16)
    pages, listed = written(arenas[0], True), torch.tensor(table, dtype=torch.int64)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    middle = centre(own[1], pages.means, listed)
    opcheck(nvfp4_gather_fp8, (own[1], middle, *pages, listed), test_utils=checks)


def op_samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for dtype, smooth in product((torch.float32, torch.bfloat16), (False, True)):
        own, arenas = operands(dtype)
        pages = [*written(arenas[0], smooth), *written(arenas[1], smooth)]
        name = f"{str(dtype).removeprefix('torch.')}{' smooth' if smooth else ''}"
        trained = [t.clone().requires_grad_() for t in own[:3]]
        slot = torch.tensor([2])
        found[f"write {name}"] = (nvfp4_write_page, (*pages[:4], own[0], slot, "mse"))
        found[f"make {name}"] = (nvfp4_quantise_page, (own[0], smooth, "mse"))
        found[f"decode {name}"] = (nvfp4_decode_pages, tuple(pages[:4]))
        listed = torch.tensor([True, False, True, False])
        found[f"listed {name}"] = (nvfp4_listed_attention, (*own[:3], *pages, listed))
        for listed in TABLES:
            table = torch.tensor(listed, dtype=torch.int64)
            found[f"{name} {listed}"] = (nvfp4_paged_attention, (*trained, *pages, table))
            backward = (own[3], *own[:3], *pages, table)
            found[f"backward {name} {listed}"] = (nvfp4_paged_attention_backward, backward)
    return found


@cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", op_samples())
def test_opcheck(name: str) -> None:
    """All of it but the schema check, as torch cannot compare float8 there; see the next test."""
    op, arguments = op_samples()[name]
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(op, arguments, test_utils=checks)


@cpu
def test_attention_changes_no_page() -> None:
    own, arenas = operands(torch.float32)
    pages = [written(values, True) for values in arenas]
    before = [raw(arena) for arena in pages]
    own = [t.requires_grad_() for t in own[:3]]
    nvfp4_paged_attention(*own, *pages[0], *pages[1], torch.tensor([1])).sum().backward()
    for arena, was in zip(pages, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(raw(arena), was, strict=True))


@cpu
def test_fakes_refuse_what_does_not_fit() -> None:
    own, arenas = operands(torch.float32)
    pages = written(arenas[0], True)
    own, pages = ([t.to("meta") for t in tensors] for tensors in (own, pages))
    table = torch.empty(2, dtype=torch.int64, device="meta")
    assert nvfp4_paged_attention(*own[:3], *pages, *pages, table).shape == own[0].shape
    with pytest.raises(RuntimeError):
        nvfp4_paged_attention(*own[:3], pages[0][..., :8], *pages[1:], *pages, table)
    with pytest.raises(RuntimeError):
        nvfp4_write_page(*pages[:3], pages[3][..., :8], own[0], table[:1])


# The kernels


@cpu
def test_kernels_in_the_interpreter() -> None:
    """They run in a process of its own: Triton reads the setting when kernels are defined."""
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, nvfp4_pages.__file__], check=True, env=environment)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels(dtype: torch.dtype) -> None:
    compare_kernels("cuda", dtype)
    compare_fp8("cuda", dtype)
    compare_kept("cuda", dtype)


@gpu
def test_pages_that_kernels_write() -> None:
    compare_writing("cuda")


@gpu
def test_kernels_over_many_tiles() -> None:
    own, arenas = operands(torch.bfloat16, 300, 128)
    pages = [*written(arenas[0], True), *written(arenas[1], True)]
    table = torch.tensor([3, 0, 2])
    wanted = nvfp4_paged_attention(*own[:3], *pages, table)
    for name in ("triton", "decode_triton", "decode", "reference"):
        run = find_implementation("nvfp4_paged_attention", name).load()
        ours = run(*(t.cuda() for t in (*own[:3], *pages, table)))
        assert worst([ours], [wanted]) <= BOUND[torch.bfloat16], name


@gpu
@pytest.mark.parametrize("listed", [[], [3, 0, 2]])
def test_attention_in_fp8_on_cuda(listed: list[int]) -> None:
    """Rows are long, and their values share a large part, which few bits would lose."""
    own, arenas = operands(torch.bfloat16, 4096, 128)
    own, arenas = [t[:1] for t in own], [t[:1] + 1 for t in arenas]
    own[2] = own[2] + 1
    pages = [*written(arenas[0], True), *written(arenas[1], True)]
    given = [t.cuda() for t in (*own[:3], *pages, torch.tensor(listed, dtype=torch.int64))]
    run = find_implementation("nvfp4_paged_attention", "fp8_decode").load()
    with torch.no_grad():
        wanted = find_implementation("nvfp4_paged_attention", "decode").load()(*given).float()
        wanted_spread = (wanted - wanted.mean(1, keepdim=True)).norm()
        for attend in (run, torch.compile(run)):
            ours = attend(*given).float()
            assert float((ours - wanted).norm() / wanted_spread) < 0.15
            assert float((ours.roll(1, 1) - wanted).norm() / wanted_spread) > 0.5
        quantised = find_implementation("fp8_quantise_attention", "fp8_decode").load()
        plain = run(*given).float().flatten(2)
        for attend in (quantised, torch.compile(quantised)):
            values, scales = attend(*given)
            assert float((values.float() * scales - plain).norm() / plain.norm()) < 0.05
            assert float((values.float() * scales - plain.roll(1, 2)).norm() / plain.norm()) > 0.05


@gpu
def test_pages_that_are_kept_decoded_are_what_attention_decodes_on_cuda() -> None:
    """Keys, values and the scale have the same bits; attention adds keys up in another order.

    The chunk's own keys are small, so that queries attend to pages too.
    """
    own, arenas = operands(torch.bfloat16, 1000, 128)
    k_pages, v_pages = (
        Pages(*(None if part is None else part.cuda() for part in written(arena, True)))
        for arena in arenas
    )
    decode = find_implementation("fp8_decode_page", "triton").load()
    held = [*kept(k_pages, decode), *kept(v_pages, decode)]
    rolled = held[2].view(torch.uint8).roll(1, 2).view(held[2].dtype)  # another token's values
    q, k, v = own[0].cuda(), own[1].cuda() / 4, own[2].cuda()
    table = torch.tensor([0, 3, 2], device="cuda")

    gather = find_implementation("nvfp4_gather_fp8", "triton").load()
    write = find_implementation("fp8_write_own", "triton").load()
    means = k_pages.means, v_pages.means
    scale = write(held[0], held[2], held[3], k, v, *means, table)
    for decoded, part, pages in ((held[0], k, k_pages), (held[2], v, v_pages)):
        wanted, largest = gather(part, centre(part, pages.means, table), *pages, table)
        for order, alike in (([0, 3, 2, 1], True), ([0, 2, 3, 1], False)):
            ours = decoded.view(torch.uint8)[:, order].flatten(1, 2)
            assert torch.equal(ours, wanted.view(torch.uint8)) == alike
    assert torch.equal(scale.cpu(), 448 / round_e4m3(largest).float().cpu())

    attend = find_implementation("fp8_quantise_attention", "fp8_decode").load()

    def attended(q: Tensor, *decoded: Tensor) -> Tensor:
        values, scales = attend(q, k, v, *k_pages, *v_pages, table, *decoded)
        return values.float() * scales

    with torch.no_grad():
        exact = attended(q)
        spread = (exact - exact.mean(1, keepdim=True)).norm()
        for queries in (q, round_e4m3(q)):
            assert float((attended(queries, *held) - exact).norm() / spread) < 0.15
        others = attended(q, *held[:2], rolled, held[3])
        assert float((others - exact).norm() / spread) > 0.5


@cpu
def test_what_the_kernels_do_not_do_is_refused() -> None:
    pytest.importorskip("triton")
    from lltk.ops.nvfp4_paged_attention import decode_triton, triton

    own, arenas = operands(torch.float32)
    pages = [*written(arenas[0], True), *written(arenas[1], True)]
    own[1].requires_grad_()
    with pytest.raises(ValueError, match="triton has no gradient; set nvfp4_paged_attention of"):
        triton.nvfp4_paged_attention(*own[:3], *pages, torch.tensor([1]))
    own, arenas = operands(torch.float32, width=48)
    pages = [*written(arenas[0], True), *written(arenas[1], True)]
    for run in (triton.nvfp4_paged_attention, decode_triton.nvfp4_paged_attention):
        with pytest.raises(ValueError, match="heads of 16, 32, 64, …, not of 48"):
            run(*own[:3], *pages, torch.tensor([1]))


@cpu
@pytest.mark.parametrize(
    ("architecture", "product"), [(90, "wgmma"), (100, "tcgen05.mma"), (120, "mma.sync")]
)
def test_kernels_compile_for(architecture: int, product: str) -> None:
    """Each has the instruction of its tensor cores, and no more shared memory than there is."""
    pytest.importorskip("triton")
    from lltk.ops.nvfp4_gather_fp8.triton import decode_fp8_kernel
    from lltk.ops.nvfp4_paged_attention.decode_triton import decode_kernel
    from lltk.ops.nvfp4_paged_attention.triton import attention_kernel
    from lltk.ops.nvfp4_write_page.triton import _sums, _write

    sizes = {"WIDTH": 128, "M": 128, "N": 64, "PRECISION": "tf32"}
    means = {"K_MEANS": True, "V_MEANS": False, "v_means": None}
    options = {"num_warps": 8, "num_stages": 1}
    compiled = cross_compiled(attention_kernel, architecture, sizes | means, options)
    assert product in compiled.asm["ptx"]
    assert compiled.metadata.shared <= {90: 227, 100: 227, 120: 99}[architecture] * 1024
    cross_compiled(decode_kernel, architecture, {"WIDTH": 128, "ROWS": 32, "MEANS": True}, {})
    sizes = {"WIDTH": 128, "ROWS": 32, "MEANS": True}
    compiled = cross_compiled(decode_fp8_kernel, architecture, sizes, {}, {"out_ptr": "*fp8e4nv"})
    assert "cvt.rn.satfinite.e4m3x2" in compiled.asm["ptx"]
    cross_compiled(_sums, architecture, {"TOKENS": 64, "CHANNELS": 128}, {}, {"sums": "*fp64"})
    sizes = {"TOP": 256.0, "RULE": "mse", "AMOUNT": 128, "NATIVE": architecture >= 100}
    compiled = cross_compiled(_write, architecture, sizes, {"enable_fp_fusion": False})
    assert ("cvt.rn.satfinite.e2m1x2" in compiled.asm["ptx"]) == (architecture >= 100)


def cross_compiled(
    kernel: Any,
    architecture: int,
    constants: dict[str, Any],
    options: dict[str, Any],
    others: dict[str, str] | None = None,
) -> Any:
    """A kernel compiled for a GPU that need not be here, with bfloat16 but where `others` says."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_means", "means"), "*bf16")
    types |= {"value": "*bf16", "mean": "*bf16", "largest": "*i32", "peaks": "*i32", "slot": "*i64"}
    types |= dict.fromkeys(("k_codes", "k_scales", "v_codes", "v_scales"), "*u8")
    types |= dict.fromkeys(("codes", "scales"), "*u8")
    types |= dict.fromkeys(("k_decode_scales", "v_decode_scales", "decode_scales"), "*fp32")
    types |= {"table": "*i64", "scale": "fp32", "own": "*bf16", "centre": "*fp32"}
    types |= others or {}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
