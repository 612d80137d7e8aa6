"""Every op against an independent dense formula, every implementation against the op."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier
from time import sleep
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn.attention.flex_attention import flex_attention

from lltk.cli.doctor import command as doctor
from lltk.models.wan22 import rope_split
from lltk.ops.block_causal_attention import flex as flex_module
from lltk.ops.block_causal_attention import merging
from lltk.ops.block_causal_attention import reference as causal_reference
from lltk.ops.block_causal_attention.op import (
    block_causal_attention,
    block_causal_attention_backward,
)
from lltk.ops.declaration import (
    ARITHMETIC,
    E2M1,
    Declaration,
    Exactness,
    read_declaration,
)
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.implementations import (
    Implementation,
    check_device,
    every_implementation,
    find_implementation,
    function_of,
    implementations,
    ops,
    overload,
)
from lltk.ops.listed_attention.op import listed_attention
from lltk.ops.paged_attention import reference as paged_reference
from lltk.ops.paged_attention.op import paged_attention, paged_attention_backward
from lltk.ops.rope_table.op import rope_table
from lltk.ops.write_page.op import write_page
from lltk.passes.lower import Lower, make_config

cpu = pytest.mark.cpu
gpu = pytest.mark.gpu

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference allowed, relative to the scale of the values compared."""
FAR = 1e-2
"""What a negative control must exceed."""
ANY_DTYPE = [torch.float32, torch.float64]
Clip = tuple[int, int, bool, int]
"""Chunks, tokens of a chunk, teacher forcing, ranks."""
CLIPS: list[Clip] = [
    (1, 5, False, 1),
    (4, 3, False, 1),
    (2, 3, True, 1),
    (6, 4, True, 1),
    (8, 3, True, 2),
    (6, 2, True, 3),
]
TABLES = [[], [2], [3, 0, 1]]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain attention of [B, L, H, D] operands under an explicit mask, True where seen."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, -torch.inf).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhlm,bmhd->blhd", weights, v)


def causal_mask(clip: Clip, late: int = 0) -> Tensor:
    """[L, L], pair by pair from the op's description; ``late`` takes that many chunks of history.

    Without teacher forcing a chunk sees chunks up to its own. With it, clean chunks do so among
    the clean, and a noisy chunk sees earlier clean chunks and itself; each rank has both.
    """
    chunks, chunk_tokens, teacher_forcing, ranks = clip
    token = torch.arange(chunks * chunk_tokens)
    if teacher_forcing:
        half = len(token) // (2 * ranks)
        rank, place = token // (2 * half), token % (2 * half)
        noisy, chunk = place >= half, (rank * half + place % half) // chunk_tokens
    else:
        noisy, chunk = token < 0, token // chunk_tokens
    own = (noisy[:, None] == noisy) & (chunk[:, None] == chunk)
    return own | (~noisy & (chunk[:, None] > chunk + late))


def random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def clip_operands(clip: Clip, dtype: torch.dtype, width: int = 8) -> list[Tensor]:
    """q, k, v and a gradient; large enough that attention is uneven."""
    shape = (2, clip[0] * clip[1], 3, width)
    return [2 * random(shape, dtype, seed) for seed in range(4)]


def page_operands(
    dtype: torch.dtype, tokens: int = 4, width: int = 8, pages: int = 4
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and a gradient, and the arenas of keys and of values."""
    own = [2 * random((2, tokens, 3, width), dtype, seed) for seed in range(4)]
    return own, [2 * random((2, pages, tokens, 3, width), dtype, seed) for seed in (4, 5)]


def dense_paged(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Sequence[int]
) -> Tensor:
    """Attention over the whole arena and the chunk, pages that are not listed masked out."""
    tokens, listed = k.shape[1], torch.zeros(k_pages.shape[1], dtype=torch.bool)
    listed[list(table)] = True
    seen = torch.cat([listed.repeat_interleave(tokens), torch.ones(tokens, dtype=torch.bool)])
    keys, values = (
        torch.cat([pages.flatten(1, 2), own], dim=1) for pages, own in ((k_pages, k), (v_pages, v))
    )
    return dense(q, keys, values, seen.expand(tokens, -1))


def worst(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference, each tensor's relative to its largest value if that is above 1."""
    return max(
        float((a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1))
        for a, b in zip(ours, (t.cpu().double() for t in theirs), strict=True)
    )


def with_gradients(
    function: Callable[..., Tensor], operands: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    """The result on q, k, v, and their gradients; the last operand is the result's gradient."""
    *inputs, grad = [t.detach().clone() for t in operands]
    for tensor in inputs:
        tensor.requires_grad_()
    result = function(*inputs, *rest)
    return [result.detach(), *torch.autograd.grad(result, inputs, grad)]


def dense_causal_in(clip: Clip, operands: Sequence[Tensor], late: int = 0) -> list[Tensor]:
    """Result and gradients of the dense formula in float64 on the CPU."""
    wide = [t.double().cpu() for t in operands]
    return with_gradients(dense, wide, causal_mask(clip, late))


def dense_paged_in(
    own: Sequence[Tensor], arenas: Sequence[Tensor], table: Sequence[int]
) -> list[Tensor]:
    wide = [t.double().cpu() for t in (*own, *arenas)]
    return with_gradients(dense_paged, wide[:4], *wide[4:], table)


# opcheck


def op_samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every op with arguments that cover dtypes, empty tables and both masks."""
    positions = torch.tensor([0.0, 7.25, 1e5], dtype=torch.float64)
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "rope_table": (rope_table, (positions, 2, 3, (4, 4, 4), 1e4))
    }
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        own, arenas = page_operands(dtype)
        slot = torch.tensor([2])
        found[f"write_page {short}"] = (write_page, (arenas[0], own[0], slot))
        found[f"write_page {short} as half"] = (write_page, (arenas[0].half(), own[0], slot))
        for listed in TABLES:
            table = torch.tensor(listed, dtype=torch.int64)
            name = f"paged_attention {short} {listed}"
            found[name] = (paged_attention, (*_trained(own[:3]), *arenas, table))
            backward = (own[3], *own[:3], *arenas, table)
            found[f"backward of {name}"] = (paged_attention_backward, backward)
        for pages in (torch.zeros(len(arenas[0][0]), dtype=torch.bool), torch.arange(4) % 2 == 0):
            name = f"listed_attention {short} {pages.tolist()}"
            found[name] = (listed_attention, (*own[:3], *arenas, pages))
        for clip in CLIPS:
            operands = clip_operands(clip, dtype)
            name = f"block_causal_attention {short} {clip}"
            found[name] = (block_causal_attention, (*_trained(operands[:3]), *clip[1:]))
            backward = (operands[3], *operands[:3], *clip[1:])
            found[f"backward of {name}"] = (block_causal_attention_backward, backward)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (*own, *operands)]
    own, operands = heads_first[:4], heads_first[4:]
    found |= {
        "paged_attention strided": (paged_attention, (*_trained(own[:3]), *arenas, table)),
        "backward of paged_attention strided": (
            paged_attention_backward,
            (own[3], *own[:3], *arenas, table),
        ),
        "block_causal_attention strided": (
            block_causal_attention,
            (*_trained(operands[:3]), *clip[1:]),
        ),
        "backward of block_causal_attention strided": (
            block_causal_attention_backward,
            (operands[3], *operands[:3], *clip[1:]),
        ),
    }
    return found


def _trained(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def _on_cuda(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().cuda().requires_grad_(argument.requires_grad)


@cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", op_samples())
def test_opcheck(name: str) -> None:
    op, arguments = op_samples()[name]
    opcheck(op, arguments)


@cpu
@pytest.mark.filterwarnings("ignore")
def test_opcheck_sees_a_wrong_fake() -> None:
    @torch.library.custom_op("lltk_tests::wrong_fake", mutates_args=())
    def wrong_fake(x: Tensor) -> Tensor:
        return x.clone()

    wrong_fake.register_fake(lambda x: x.new_empty(x.shape[::-1]))
    with pytest.raises(Exception, match="test_faketensor failed"):
        opcheck(wrong_fake, (torch.zeros(2, 3),))


@cpu
def test_fakes_refuse_what_does_not_fit() -> None:
    own, arenas = page_operands(torch.float32)
    table = torch.zeros(1, dtype=torch.int64)
    meta = [t.to("meta") for t in (*own[:3], *arenas, table)]
    assert paged_attention(*meta).shape == own[0].shape
    with pytest.raises(RuntimeError):
        paged_attention(*meta[:3], meta[3][..., :4], *meta[4:])
    with pytest.raises(RuntimeError):
        write_page(meta[3], meta[0][:, :3], meta[5][:1])
    with pytest.raises(RuntimeError):
        block_causal_attention(*meta[:3], 3, False)
    with pytest.raises(RuntimeError):
        block_causal_attention(*meta[:3], 4, True)
    with pytest.raises(RuntimeError):
        block_causal_attention(*meta[:3], 2, True, 2)


# Block-causal attention


@cpu
@pytest.mark.parametrize("dtype", ANY_DTYPE)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_block_causal_attention(name: str, clip: Clip, dtype: torch.dtype) -> None:
    run = find_implementation("block_causal_attention", name).load()
    operands = clip_operands(clip, dtype)
    ours = with_gradients(run, operands, *clip[1:])
    assert all(t.dtype == dtype for t in ours)
    assert worst(ours, dense_causal_in(clip, operands)) <= BOUND[dtype]


@cpu
@pytest.mark.parametrize("name", ["reference", "sdpa"])
@pytest.mark.parametrize("clip", [(4, 3, False, 1), (6, 4, True, 1), (8, 3, True, 2)])
def test_a_mask_one_chunk_off_is_seen(name: str, clip: Clip) -> None:
    run = find_implementation("block_causal_attention", name).load()
    operands = clip_operands(clip, torch.float64)
    ours = with_gradients(run, operands, *clip[1:])
    theirs = dense_causal_in(clip, operands, late=1)
    assert min(worst([a], [b]) for a, b in zip(ours, theirs, strict=True)) > FAR


@cpu
@given(st.integers(1, 4), st.integers(1, 6), st.booleans(), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=25)
def test_block_causal_backward_is_the_derivative(
    chunks: int, chunk_tokens: int, teacher_forcing: bool, ranks: int, seed: int
) -> None:
    clip = (chunks * (2 * ranks if teacher_forcing else 1), chunk_tokens, teacher_forcing, ranks)
    operands = [t + 0.3 * seed for t in clip_operands(clip, torch.float64, width=4)]
    *inputs, grad = operands
    ours = causal_reference.block_causal_attention_backward(grad, *inputs, *clip[1:])
    assert worst(ours, dense_causal_in(clip, operands)[1:]) <= BOUND[torch.float64]


@cpu
def test_half_precision_sums_in_float32() -> None:
    clip = CLIPS[-1]
    operands = clip_operands(clip, torch.bfloat16)
    ours = with_gradients(block_causal_attention, operands, *clip[1:])
    assert all(t.dtype == torch.bfloat16 for t in ours)
    # Half of bfloat16's last bit: nothing but the result was rounded.
    assert worst(ours, dense_causal_in(clip, operands)) <= 2**-8
    own, arenas = page_operands(torch.bfloat16)
    ours = with_gradients(paged_attention, own, *arenas, torch.tensor([1, 3]))
    assert worst(ours, dense_paged_in(own, arenas, [1, 3])) <= 2**-8


# Runs of keys merged: the algorithm with a CPU's kernel


def _forward_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse


def _backward_on_cpu(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    made: tuple[Tensor, Tensor, Tensor] = backward(*given, 0.0, False)
    return made


ON_CPU = merging.Kernel(_forward_on_cpu, _backward_on_cpu)


def merged_in(clip: Clip, operands: Sequence[Tensor]) -> list[Tensor]:
    """Result and gradients by runs of keys."""
    *inputs, grad = operands
    out, lse = merging.attend(ON_CPU, *inputs, *clip[1:])
    return [out, *merging.differentiate(ON_CPU, grad, *inputs, out, lse, *clip[1:])]


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", CLIPS)
def test_merged_runs_are_one_attention(clip: Clip, dtype: torch.dtype) -> None:
    operands = clip_operands(clip, dtype)
    ours = merged_in(clip, operands)
    assert all(t.dtype == dtype for t in ours)
    assert worst(ours, dense_causal_in(clip, operands)) <= BOUND[dtype]


@cpu
@pytest.mark.parametrize("clip", [(6, 4, True, 1), (8, 3, True, 2)])
def test_runs_of_another_mask_are_seen(clip: Clip) -> None:
    operands = clip_operands(clip, torch.float32)
    theirs = dense_causal_in(clip, operands, late=1)
    assert worst(merged_in(clip, operands), theirs) > FAR


# FlexAttention: its blocks and its formula on a CPU, its kernel on a GPU


def seen_through_blocks(blocks: Any, tokens: int, by_key: bool) -> Tensor:
    """[L, L] as the kernels read it: full blocks whole, partial ones through the mask function.

    Args:
        blocks: a BlockMask.
        tokens: L.
        by_key: read the query blocks of each key block, as the backward kernel does.
    """
    names = ("q_num_blocks", "q_indices") if by_key else ("kv_num_blocks", "kv_indices")
    sides = []
    for prefix in ("", "full_"):
        count, index = (getattr(blocks, prefix + name)[0, 0] for name in names)
        side = torch.zeros(index.shape, dtype=torch.bool)
        for row in range(len(count)):
            columns = index[row, : count[row]].long()
            assert len(set(columns.tolist())) == len(columns)
            side[row, columns] = True
        sides.append(side.T if by_key else side)
    partial, full = sides
    assert not (partial & full).any(), "a block is listed twice"
    size = flex_module.BLOCK
    whole, some = (
        side.repeat_interleave(size, 0).repeat_interleave(size, 1)[:tokens, :tokens]
        for side in (full, partial)
    )
    token = torch.arange(tokens)
    zero = torch.tensor(0)
    exact = blocks.mask_mod(zero, zero, token[:, None], token[None, :])
    for row, column in partial.nonzero().tolist():
        block = exact[row * size : (row + 1) * size, column * size : (column + 1) * size]
        assert block.any(), "a block that nothing sees is visited"
    return whole | (some & exact)


@cpu
@given(st.integers(1, 4), st.integers(1, 300), st.booleans(), st.integers(1, 2))
def test_flex_blocks_cover_the_mask(
    chunks: int, chunk_tokens: int, teacher_forcing: bool, ranks: int
) -> None:
    clip = (chunks * (2 * ranks if teacher_forcing else 1), chunk_tokens, teacher_forcing, ranks)
    tokens, wanted = clip[0] * chunk_tokens, causal_mask(clip)
    blocks = flex_module.block_mask(tokens, *clip[1:], torch.device("cpu"))
    assert torch.equal(seen_through_blocks(blocks, tokens, by_key=False), wanted)
    assert torch.equal(seen_through_blocks(blocks, tokens, by_key=True), wanted)
    size = flex_module.BLOCK
    reached = torch.nn.functional.pad(wanted, (0, -tokens % size, 0, -tokens % size))
    reached = reached.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), reached)


@cpu
def test_flex_blocks_of_another_chunk_are_seen_to_differ() -> None:
    blocks = flex_module.block_mask(600, 100, True, 1, torch.device("cpu"))
    assert not torch.equal(seen_through_blocks(blocks, 600, False), causal_mask((4, 150, True, 1)))


@cpu
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(st.integers(1, 3), st.integers(1, 150), st.booleans())
@settings(max_examples=15)
def test_flex_formula(chunks: int, chunk_tokens: int, teacher_forcing: bool) -> None:
    clip = (chunks * (2 if teacher_forcing else 1), chunk_tokens, teacher_forcing, 1)
    q, k, v, _ = clip_operands(clip, torch.float32, width=4)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(flex_module, "_flex_attention", flex_attention)
        ours = flex_module.block_causal_attention(q, k, v, *clip[1:])
    wide = [t.double() for t in (q, k, v)]
    assert worst([ours], [dense(*wide, causal_mask(clip))]) <= BOUND[torch.float32]


GPU_CLIPS: list[Clip] = [
    (3, 96, False, 1),
    (4, 128, True, 1),
    (6, 100, True, 1),
    (8, 256, True, 2),
    (5, 33, False, 1),
]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", GPU_CLIPS)
def test_flex_kernel(clip: Clip, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    operands = [t.cuda() for t in clip_operands(clip, dtype, width=64)]
    ours = with_gradients(flex_module.block_causal_attention, operands, *clip[1:])
    theirs = dense_causal_in(clip, operands)
    bound = {torch.float32: 1e-4, torch.bfloat16: BOUND[torch.bfloat16]}[dtype]
    assert worst(ours, theirs) <= bound
    assert worst(ours, dense_causal_in(clip, operands, late=1)) > 10 * bound


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [(3, 96, False, 1), (6, 64, True, 1), (8, 96, True, 2)])
def test_cudnn_attends_to_runs(clip: Clip, dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    run = find_implementation("block_causal_attention", "cudnn").load()
    operands = [t.cuda() for t in clip_operands(clip, dtype, width=64)]
    ours = with_gradients(torch.compile(run) if compiled else run, operands, *clip[1:])
    assert worst(ours, dense_causal_in(clip, operands)) <= BOUND[dtype]
    assert worst(ours, dense_causal_in(clip, operands, late=1)) > 5 * BOUND[dtype]


@cpu
def test_cudnn_refuses_float32_in_training() -> None:
    run = find_implementation("block_causal_attention", "cudnn").load()
    message = refused(run, *clip_operands(CLIPS[0], torch.float32)[:3], *CLIPS[0][1:])
    assert message.startswith("block_causal_attention: cudnn attends in bfloat16 or float16, not ")


@gpu
@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_block_causal_attention_on_cuda(name: str) -> None:
    run = find_implementation("block_causal_attention", name).load()
    for clip in CLIPS:
        operands = [t.cuda() for t in clip_operands(clip, torch.float32)]
        ours = with_gradients(run, operands, *clip[1:])
        assert worst(ours, dense_causal_in(clip, operands)) <= 1e-4


# Paged attention


@cpu
@pytest.mark.parametrize("dtype", ANY_DTYPE)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_paged_attention(name: str, table: list[int], dtype: torch.dtype) -> None:
    run = find_implementation("paged_attention", name).load()
    own, arenas = page_operands(dtype)
    ours = with_gradients(run, own, *arenas, torch.tensor(table, dtype=torch.int64))
    assert all(t.dtype == dtype for t in ours)
    assert worst(ours, dense_paged_in(own, arenas, table)) <= BOUND[dtype]
    one_more = [*table, min({0, 1, 2, 3} - set(table))]
    assert worst(ours, dense_paged_in(own, arenas, one_more)) > FAR


@cpu
@given(st.permutations(range(5)), st.integers(0, 5), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=25)
def test_paged_backward_is_the_derivative(
    order: list[int], listed: int, tokens: int, width: int
) -> None:
    own, arenas = page_operands(torch.float64, tokens, width, pages=5)
    table = order[:listed]
    ours = paged_reference.paged_attention_backward(
        own[3], *own[:3], *arenas, torch.tensor(table, dtype=torch.int64)
    )
    assert worst(ours, dense_paged_in(own, arenas, table)[1:]) <= BOUND[torch.float64]


@cpu
def test_a_wrong_derivative_is_seen() -> None:
    own, arenas = page_operands(torch.float64)
    theirs = dense_paged_in(own, arenas, [1])[1:]
    frozen = [t.clone() for t in own]
    frozen[3] = frozen[3] - frozen[3].mean(-1, keepdim=True)
    table = torch.tensor([1])
    ours = paged_reference.paged_attention_backward(frozen[3], *own[:3], *arenas, table)
    assert min(worst([a], [b]) for a, b in zip(ours, theirs, strict=True)) > FAR


@cpu
@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_page_order_does_not_matter(name: str) -> None:
    run = find_implementation("paged_attention", name).load()
    own, arenas = page_operands(torch.float64)
    one, other = (
        with_gradients(run, own, *arenas, torch.tensor(t)) for t in ([0, 2, 3], [3, 0, 2])
    )
    assert worst(one, other) <= BOUND[torch.float64]
    moved = [pages.roll(1, dims=1) for pages in arenas]
    assert worst(one, with_gradients(run, own, *moved, torch.tensor([1, 3, 0]))) <= 1e-12
    assert worst(one, with_gradients(run, own, *moved, torch.tensor([0, 2, 3]))) > FAR


@cpu
@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_committed_pages_are_constants(name: str) -> None:
    run = find_implementation("paged_attention", name).load()
    own, arenas = page_operands(torch.float32)
    pages = _trained(arenas)
    inputs = _trained(own[:3])
    run(*inputs, *pages, torch.tensor([0, 1])).sum().backward()
    assert all(t.grad is not None for t in inputs)
    assert [t.grad for t in pages] == [None, None]


@cpu
def test_pages_may_be_narrower_than_the_chunk() -> None:
    own, arenas = page_operands(torch.float32)
    narrow = [pages.bfloat16() for pages in arenas]
    theirs = dense_paged_in(own, narrow, [1, 2])
    for name in ("reference", "sdpa"):
        run = find_implementation("paged_attention", name).load()
        ours = with_gradients(run, own, *narrow, torch.tensor([1, 2]))
        assert worst(ours, theirs) <= BOUND[torch.float32]
        assert worst(ours, dense_paged_in(own, arenas, [1, 2])) > 10 * BOUND[torch.float32]


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", TABLES)
def test_cudnn(table: list[int], dtype: torch.dtype) -> None:
    run = find_implementation("paged_attention", "cudnn").load()
    own, arenas = page_operands(dtype, tokens=96, width=64)
    moved = [t.cuda() for t in (*own, *arenas, torch.tensor(table, dtype=torch.int64))]
    ours = with_gradients(run, moved[:4], *moved[4:])
    assert worst(ours, dense_paged_in(own, arenas, table)) <= BOUND[dtype]
    one_more = [*table, min({0, 1, 2, 3} - set(table))]
    assert worst(ours, dense_paged_in(own, arenas, one_more)) > 5 * BOUND[dtype]


@cpu
def test_cudnn_refuses_float32() -> None:
    run = find_implementation("paged_attention", "cudnn").load()
    own, arenas = page_operands(torch.float32, tokens=64, width=64)
    with pytest.raises(ValueError, match="attends in bfloat16 or float16, not in"):
        run(*own[:3], *arenas, torch.tensor([0]))


@gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", op_samples())
def test_opcheck_on_cuda(name: str) -> None:
    op, arguments = op_samples()[name]
    opcheck(op, tuple(map(_on_cuda, arguments)))


# Rotary tables


def diffusers_table(frames: int, height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """diffusers' own tables of a clip's tokens, frames from 0."""
    rope = WanRotaryPosEmbed(head_dim, (1, 1, 1), max_seq_len=1024)
    cos, sin = rope(torch.empty(1, 1, frames, height, width))
    return cos, sin


@cpu
@given(
    st.integers(1, 5), st.integers(0, 900), st.integers(1, 4), st.integers(1, 5), st.integers(3, 64)
)
def test_rope_table_has_the_bits_of_diffusers(
    frames: int, start: int, height: int, width: int, half: int
) -> None:
    positions = torch.arange(start, start + frames, dtype=torch.float64)
    ours = rope_table(positions, height, width, rope_split(2 * half), 10000.0)
    theirs = diffusers_table(start + frames, height, width, 2 * half)
    last = frames * height * width
    for mine, whole in zip(ours, theirs, strict=True):
        assert mine.shape == (1, last, 1, 2 * half)
        assert torch.equal(mine, whole[:, -last:])


@cpu
def test_a_shift_of_one_frame_is_seen_in_the_table() -> None:
    positions = torch.arange(1, 4, dtype=torch.float64)
    ours = rope_table(positions, 2, 2, (4, 4, 4), 10000.0)
    assert worst(ours, diffusers_table(3, 2, 2, 12)) > FAR


@cpu
@given(st.floats(-1e5, 1e5, allow_nan=False), st.integers(3, 32), st.sampled_from([1e4, 256.0]))
def test_rope_table_at_any_position(position: float, half: int, theta: float) -> None:
    head_dim, height, width = 2 * half, 2, 3
    cos, sin = rope_table(
        torch.tensor([position], dtype=torch.float64), height, width, rope_split(head_dim), theta
    )
    side = 2 * (head_dim // 6)
    for row in range(height):
        for column in range(width):
            angles = [
                where / theta ** (pair / (size // 2))
                for where, size in (
                    (position, head_dim - 2 * side),
                    (float(row), side),
                    (float(column), side),
                )
                for pair in range(size // 2)
            ]
            wanted = torch.tensor(angles, dtype=torch.float64).repeat_interleave(2)
            token = row * width + column
            # An angle of 1e5 has an error of 1e-11, far below float32's last bit.
            torch.testing.assert_close(cos[0, token, 0].double(), wanted.cos(), rtol=0, atol=6e-8)
            torch.testing.assert_close(sin[0, token, 0].double(), wanted.sin(), rtol=0, atol=6e-8)


@cpu
def test_float32_positions_would_be_seen() -> None:
    exact = torch.tensor([54321.2], dtype=torch.float64)
    ours, rounded = (
        rope_table(p, 1, 1, (4, 4, 4), 10000.0) for p in (exact, exact.float().double())
    )
    assert worst(ours, rounded) > 1e-4


@gpu
def test_rope_table_on_cuda() -> None:
    positions = torch.cat([torch.arange(64), torch.tensor([0.3, 1e5 + 0.7])]).double()
    here = rope_table(positions, 3, 5, (44, 42, 42), 10000.0)
    there = rope_table(positions.cuda(), 3, 5, (44, 42, 42), 10000.0)
    for a, b in zip(here, there, strict=True):
        # float64's cosine may differ in its last bit, which flips a float32 rounding at most.
        assert (a - b.cpu()).abs().max() <= 2**-24
        assert (a == b.cpu()).double().mean() > 0.999


# Writing pages


@cpu
@given(st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_write_page_changes_one_page(slot: int, dtype: torch.dtype) -> None:
    own, (pages, _) = page_operands(torch.float32)
    pages = pages.to(dtype)
    before = pages.clone()
    write_page(pages, own[0], torch.tensor([slot]))
    assert torch.equal(pages[:, slot], own[0].to(dtype))
    kept = [page for page in range(4) if page != slot]
    assert torch.equal(pages[:, kept], before[:, kept])
    assert not torch.equal(pages, before)


# The register of implementations


@cpu
def test_every_implementation_loads_with_the_ops_signature() -> None:
    for implementation in every_implementation():
        op, name = implementation.op, implementation.name
        schema = [argument.name for argument in overload(op)._schema.arguments]
        run = implementation.load()
        if all(map(find_spec, implementation.modules)) and name != "reference":
            assert list(inspect.signature(function_of(op, name)).parameters) in (
                schema,
                ["args", "kwargs"],  # of an operator
            )
        if isinstance(run, torch._ops.OpOverload):
            assert [argument.name for argument in run._schema.arguments] == schema
            assert [a.is_write for a in run._schema.arguments] == [
                a.is_write for a in overload(op)._schema.arguments
            ]
        assert find_implementation(op, name) is implementation


@cpu
def test_threads_that_load_an_implementation_get_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registering its operator a second time would end the first registration."""
    (tmp_path / "in_threads").mkdir()
    (tmp_path / "in_threads" / "fast.py").write_text(
        "from lltk.ops.declaration import Declaration, Exactness\n"
        'DECLARATION = Declaration(Exactness.ROUNDING, "for threads", opaque=True)\n'
        "def write_page(page, value, slot): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    start = Barrier(4)

    def load(_: int) -> object:
        start.wait()
        return find_implementation("write_page", "in_threads.fast").load()

    found = overload("write_page")
    monkeypatch.setattr("lltk.ops.implementations.overload", lambda op: (sleep(0.02), found)[1])
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(load, range(4)))) == 1


@cpu
def test_every_op_has_a_reference_and_one_default() -> None:
    for op in ops():
        found = implementations(op)
        assert found["reference"].declared.exactness is Exactness.REFERENCE
        assert sum(each.declared.default for each in found.values()) <= 1
        exact = [each.declared.exactness for each in found.values()]
        assert exact.count(Exactness.REFERENCE) == 1


@cpu
def test_lower_offers_what_there_is() -> None:
    prefer, *keys = Lower.Config.model_fields
    assert prefer == "prefer" and keys == list(ops())
    for op in keys:
        field = Lower.Config.model_fields[op]
        assert field.default is None
        assert all(name in str(field.description) for name in implementations(op))


@cpu
def test_an_unknown_implementation_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no implementation 'cudn' \(it has .*\).*'cudnn'\?"):
        find_implementation("paged_attention", "cudn")
    with pytest.raises(ValueError, match=r"rope_table has no implementation 'cudnn'"):
        find_implementation("rope_table", "cudnn")


@cpu
def test_what_an_implementation_lacks_is_said() -> None:
    here = torch.device("cpu")
    for implementation in every_implementation():
        missing = implementation.missing(here)
        if "cpu" in implementation.devices:
            assert missing is None
        else:
            assert missing == "runs on cuda, not on cpu"
    modules = ("torch", "lltk_no_such_package")
    needy = Declaration(Exactness.BITWISE, "", devices=("cpu",), modules=modules)
    found = Implementation("op", "name", "m", needy)
    assert found.missing(here) == "needs the package lltk-no-such-package"
    chosen = {"paged_attention": "sdpa", "block_causal_attention": "reference"}
    check_device(chosen, here)
    with pytest.raises(ValueError, match=r"cudnn runs on cuda, not on cpu; cpu has reference and"):
        check_device(chosen | {"paged_attention": "cudnn"}, here)
    if not torch.cuda.is_available():
        plain = Implementation("op", "name", "m", Declaration(Exactness.BITWISE, ""))
        assert plain.missing(torch.device("cuda")) == "no CUDA device is visible"


@cpu
def test_parts_needs_are_the_wholes() -> None:
    te = find_implementation("nvfp4_linear", "te")
    assert te.declared.modules == () and set(te.modules) == {"triton", "transformer_engine"}
    assert te.devices == ("cuda",) and te.architectures == E2M1
    assert find_implementation("nvfp4_paged_attention", "fp8_decode").modules == (
        "triton",
        "cudnn",
    )


@cpu
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("DECLARATION = Declaration(Exactness.BITWISE, how)", "name 'how' is not defined"),
        ("DECLARATION = Declaration(Exactness.EXACT, '')", "EXACT"),
        ("DECLARATION = Declaration(Exactness.BITWISE)", "missing 1 required"),
        ("DECLARATION = Declaration(", "'(' was never closed"),
        ("DECLARATION = 'fast'", "'fast' is no Declaration"),
    ],
)
def test_declarations_that_cannot_be_read_are_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "fast.py"
    file.write_text(text)
    with pytest.raises(ValueError, match="its declaration cannot be read") as caught:
        read_declaration(file)
    assert str(file) in str(caught.value) and said in str(caught.value)


@cpu
def test_declarations_are_read_without_importing(tmp_path: Path) -> None:
    file = tmp_path / "fast.py"
    file.write_text(
        "import nothing_of_the_kind\n"
        "DECLARATION: object = "
        "Declaration(Exactness.ROUNDING, 'fast', architectures=(*ARITHMETIC, (9, 9)))"
    )
    found = read_declaration(file)
    assert found == Declaration(Exactness.ROUNDING, "fast", architectures=(*ARITHMETIC, (9, 9)))
    file.write_text("raise SystemExit")
    assert read_declaration(file) is None


_NEW = """
from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_matmul.reference import fp8_matmul as formula

DECLARATION = Declaration(
    Exactness.ROUNDING, "twice and halved", modules=("no_such_module",), opaque=True
)

def fp8_matmul(a, a_scales, b, b_scales, bias, dtype):
    return formula(a, a_scales * 2, b, b_scales / 2, bias, dtype)
"""


@cpu
def test_a_new_file_is_a_new_implementation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lower's configuration, doctor's tables and the checks know it, and no other line names it."""
    (tmp_path / "doubled.py").write_text(_NEW)
    folder = import_module("lltk.ops.fp8_matmul")
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    implementations.cache_clear()
    try:
        field = make_config().model_fields["fp8_matmul"]
        assert "doubled: twice and halved" in str(field.description)
        assert Lower.Config(prefer=("doubled",)).chosen("fp8_matmul").name == "doubled"
        out = CliRunner().invoke(doctor, ["--json"]).output
        rows = json.loads(out)["how implementations work"]
        assert {"op": "fp8_matmul", "implementation": "doubled", "GPUs": "any"} | {
            "result": "rounding: twice and halved",
        } in rows
        assert "no-such-module" in {row["package"] for row in json.loads(out)["packages"]}
        with pytest.raises(ValueError, match="doubled needs the package no-such-module; cpu has"):
            check_device({"fp8_matmul": "doubled"}, torch.device("cpu"))
        run = find_implementation("fp8_matmul", "doubled").load()
        a, b = torch.randn(3, 16), torch.randn(5, 16)
        operands = (*fp8_quantise(a), *fp8_quantise(b), None, torch.float32)
        assert torch.allclose(run(*operands), overload("fp8_matmul")(*operands))
        assert str(run) == "lltk.fp8_matmul_doubled.default"
    finally:
        implementations.cache_clear()
