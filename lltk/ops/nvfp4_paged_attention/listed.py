"""Kernels that attend to listed pages in NVFP4 where no shape tells how many are listed.

They are for `lltk.export.kernels`, which compiles them beforehand. The first decodes the listed
pages, one after another, into a buffer, and reads no other page. The second attends to the chunk's
own keys and to as many of the buffer as pages are listed. Decoding inside attention would repeat it
for each tile of queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lltk.ops.nvfp4_paged_attention.triton import block_values

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def decode_listed_kernel(
    codes, scales, decode_scales, means, listed, held,
    PAGES: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    MEANS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a page, decoded to their place among the listed; nothing if it is not listed.

    Args:
        codes, scales, decode_scales, means: an arena's `Pages`; ``means`` is not read without
            MEANS.
        listed: bool [P].
        held: [B, P * T, H, D], of which the listed pages fill the first rows.
        ROWS: the rows of a program, a row being one head of one token.
        SLOTS: a power of two, P or more.
    """
    slot, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if tl.load(listed + slot) != 0:
        slots = tl.arange(0, SLOTS)
        before = tl.load(listed + slots, mask=slots < slot, other=0) != 0
        place = (batch * PAGES + tl.sum(before.to(tl.int32), 0)) * TOKENS * HEADS
        page = batch * PAGES + slot
        row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
        read = row < TOKENS * HEADS
        first = page * TOKENS * HEADS
        values = block_values(
            codes + first * (WIDTH // 2), scales + first * (WIDTH // 16), row, read, WIDTH, ROWS
        ).to(tl.float32)
        head = page * HEADS + row % HEADS
        values *= (tl.load(decode_scales + head, mask=read, other=0.0) * 16384.0)[:, None]
        if MEANS:
            places = head[:, None] * WIDTH + channel[None, :]
            values += tl.load(means + places, mask=read[:, None], other=0.0).to(tl.float32)
        places = (place + row[:, None]) * WIDTH + channel[None, :]
        tl.store(held + places, values.to(held.dtype.element_ty), mask=read[:, None])


@triton.jit
def attend_listed_kernel(
    q, k, v, k_held, v_held, listed, out,
    PAGES: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M queries of one head over the chunk's own keys and over those that are held.

    Args:
        q, k, v, out: [B, L, H, D].
        k_held, v_held: [B, P * T, H, D], what `decode_listed_kernel` made.
        listed: bool [P].
        TOKENS: L, which is T too.
        SLOTS: a power of two, P or more.
        M, N: queries and keys of a tile.
    """
    tile = tl.program_id(0)
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    slots = tl.arange(0, SLOTS)
    seen = tl.load(listed + slots, mask=slots < PAGES, other=0) != 0
    held = tl.sum(seen.to(tl.int32), 0) * TOKENS
    own, kept = batch * TOKENS * HEADS * WIDTH, batch * PAGES * TOKENS * HEADS * WIDTH
    queries = tl.make_tensor_descriptor(
        q + own, [TOKENS, HEADS * WIDTH], [HEADS * WIDTH, 1], [M, WIDTH]
    )
    asked = queries.load([tile * M, head * WIDTH])
    best = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WIDTH), tl.float32)
    acc, total, best = _over(
        asked, acc, total, best, k + own, v + own, TOKENS, head, HEADS, WIDTH, N
    )
    acc, total, best = _over(
        asked, acc, total, best, k_held + kept, v_held + kept, held, head, HEADS, WIDTH, N
    )
    query, channel = tile * M + tl.arange(0, M), tl.arange(0, WIDTH)
    places = own + query[:, None] * (HEADS * WIDTH) + head * WIDTH + channel[None, :]
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + places, result, mask=(query < TOKENS)[:, None])


@triton.jit
def _over(
    asked, acc, total, best, k, v, count, head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The online softmax over ``count`` keys, which may be 0."""
    rows = tl.maximum(count, 1)  # a descriptor of no rows is invalid
    keys = tl.make_tensor_descriptor(k, [rows, HEADS * WIDTH], [HEADS * WIDTH, 1], [N, WIDTH])
    values = tl.make_tensor_descriptor(v, [rows, HEADS * WIDTH], [HEADS * WIDTH, 1], [N, WIDTH])
    whole = count // N * N
    for start in tl.range(0, whole, N):
        acc, total, best = _tile(
            asked, acc, total, best, keys, values, start, count, head, WIDTH, N, False
        )
    if whole < count:
        acc, total, best = _tile(
            asked, acc, total, best, keys, values, whole, count, head, WIDTH, N, True
        )
    return acc, total, best


@triton.jit
def _tile(
    asked, acc, total, best, keys, values, start, count, head,
    WIDTH: tl.constexpr, N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """N keys, of which only those before ``count`` are there if PART; the first one always is."""
    scores = tl.dot(asked, keys.load([start, head * WIDTH]).T)
    if PART:
        there = start + tl.arange(0, N) < count
        scores = tl.where(there[None, :], scores, float("-inf"))
    scale: tl.constexpr = WIDTH**-0.5 * _LOG2_E
    highest = tl.maximum(best, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - highest[:, None])
    shrunk = tl.exp2(best - highest)
    total = total * shrunk + tl.sum(p, 1)
    read = values.load([start, head * WIDTH])
    return tl.dot(p.to(read.dtype), read, acc * shrunk[:, None]), total, highest
