"""`attend_listed_kernel` for Hopper, in which loads, products and softmaxes overlap.

A block has three groups of warps. One loads tiles of keys and values ahead. Each of the other two
attends with 64 queries: while its tensor cores multiply the weights of one tile by the values, it
computes the weights of the next. The two take turns at issuing products, so that one computes
weights while the other multiplies. This is the schedule of FlashAttention-3
(https://arxiv.org/abs/2407.08608).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""A barrier of a group of warps, by its name in Triton 3.7 or in 3.6."""


@gluon.jit
def attend_listed_hopper_kernel(
    q, k, v, k_held, v_held, listed, out,
    PAGES: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr,
    SLOTS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """128 queries of one head over the chunk's own keys and over those that are held.

    Args:
        q, k, v, out: bfloat16 [B, L, H, D].
        k_held, v_held: bfloat16 [B, P * T, H, D], what `decode_listed_kernel` made.
        listed: bool [P].
        TOKENS: L, which is T too.
        SLOTS: a power of two, P or more.
        N: keys of a tile.
        STAGES: tiles of keys, and of values, that fit into shared memory.
        TURNS: whether the two groups take turns.
    """
    first = gl.program_id(0) * 128
    batch, head = gl.program_id(1) // HEADS, gl.program_id(1) % HEADS
    slots = gl.arange(0, SLOTS, gl.BlockedLayout([1], [32], [4], [0]))
    seen = gl.load(listed + slots, mask=slots < PAGES, other=0) != 0
    held = gl.sum(seen.to(gl.int32), 0) * TOKENS
    row: gl.constexpr = HEADS * WIDTH
    own, kept = batch.to(gl.int64) * TOKENS * row, batch.to(gl.int64) * PAGES * TOKENS * row
    dtype: gl.constexpr = q.dtype.element_ty
    Q_SPACE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, WIDTH], dtype)
    SPACE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, WIDTH], dtype)
    queries = tma.make_tensor_descriptor(q + own, [TOKENS, row], [row, 1], [64, WIDTH], Q_SPACE)
    own_keys = _tiles(k + own, TOKENS, row, N, WIDTH, SPACE)
    own_values = _tiles(v + own, TOKENS, row, N, WIDTH, SPACE)
    held_keys = _tiles(k_held + kept, held, row, N, WIDTH, SPACE)
    held_values = _tiles(v_held + kept, held, row, N, WIDTH, SPACE)
    asked = gl.allocate_shared_memory(dtype, [2, 64, WIDTH], Q_SPACE)
    keys = gl.allocate_shared_memory(dtype, [STAGES, N, WIDTH], SPACE)
    values = gl.allocate_shared_memory(dtype, [STAGES, N, WIDTH], SPACE)
    asked_full = _barriers(1)
    k_full = _barriers(STAGES)
    k_empty = _barriers(STAGES)
    v_full = _barriers(STAGES)
    v_empty = _barriers(STAGES)
    turns = _barriers(2)
    mbarrier.init(asked_full.index(0), count=1)
    for index in gl.static_range(STAGES):
        mbarrier.init(k_full.index(index), count=1)
        mbarrier.init(v_full.index(index), count=1)
        mbarrier.init(k_empty.index(index), count=2)
        mbarrier.init(v_empty.index(index), count=2)
    for index in gl.static_range(2):
        mbarrier.init(turns.index(index), count=1)
    column = head * WIDTH
    out += own
    gl.warp_specialize(
        [
            (_consume, (
                0, asked, keys, values, asked_full, k_full, k_empty, v_full, v_empty, turns, out,
                first, column, held, TOKENS, HEADS, WIDTH, N, STAGES, TURNS,
            )),
            (_consume, (
                1, asked, keys, values, asked_full, k_full, k_empty, v_full, v_empty, turns, out,
                first, column, held, TOKENS, HEADS, WIDTH, N, STAGES, TURNS,
            )),
            (_produce, (
                queries, own_keys, own_values, held_keys, held_values, asked, keys, values,
                asked_full, k_full, k_empty, v_full, v_empty, first, column, held,
                TOKENS, N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _barriers(count: gl.constexpr):
    """Barriers that have yet to be initialised."""
    return gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())


@gluon.jit
def _tiles(
    base, count, row: gl.constexpr, N: gl.constexpr, WIDTH: gl.constexpr, SPACE: gl.constexpr
):  # fmt: skip
    """A descriptor of ``count`` rows, beyond which 0 is loaded; one of no rows is invalid."""
    rows = gl.maximum(count, 1)
    return tma.make_tensor_descriptor(base, [rows, row], [row, 1], [N, WIDTH], SPACE)


@gluon.jit
def _produce(
    queries, own_keys, own_values, held_keys, held_values, asked, keys, values,
    asked_full, k_full, k_empty, v_full, v_empty, first, column, held,
    TOKENS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the queries, then tiles of keys and values into what both groups have read."""
    mbarrier.expect(asked_full.index(0), 2 * queries.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(
            queries, [first + 64 * half, column], asked_full.index(0), asked.index(half)
        )
    OWN: gl.constexpr = (TOKENS + N - 1) // N
    for tile in range(OWN):
        stage, phase = tile % STAGES, (tile // STAGES) & 1
        _load(own_keys, tile * N, column, keys, k_full, k_empty, stage, phase)
        _load(own_values, tile * N, column, values, v_full, v_empty, stage, phase)
    for index in range((held + N - 1) // N):
        tile = OWN + index
        stage, phase = tile % STAGES, (tile // STAGES) & 1
        _load(held_keys, index * N, column, keys, k_full, k_empty, stage, phase)
        _load(held_values, index * N, column, values, v_full, v_empty, stage, phase)


@gluon.jit
def _load(tiles, row, column, space, full, empty, stage, phase):
    """Load a tile into a place of shared memory as soon as it is empty."""
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(tiles, [row, column], full.index(stage), space.index(stage))


@gluon.jit
def _consume(
    me: gl.constexpr, asked, keys, values, asked_full, k_full, k_empty, v_full, v_empty, turns, out,
    first, column, held,
    TOKENS: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Attend with 64 queries, the first or the second of the block."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16]
    )
    RESULT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16]
    )
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    SCALE: gl.constexpr = WIDTH**-0.5 * 1.4426950408889634
    OWN: gl.constexpr = (TOKENS + N - 1) // N
    tiles = OWN + (held + N - 1) // N
    dtype: gl.constexpr = keys.dtype
    zeros = gl.zeros((64, N), gl.float32, SCORES)
    best = gl.full((64,), float("-inf"), gl.float32, ROW)
    total = gl.zeros((64,), gl.float32, ROW)
    acc = gl.zeros((64, WIDTH), gl.float32, RESULT)
    mine = asked.index(me)
    mbarrier.wait(asked_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(mine, keys.index(0).permute((1, 0)), zeros, use_acc=False)
    mbarrier.arrive(k_empty.index(0), count=1)
    p, best, total, shrunk = _softmax(scores, best, total, 0, held, SCALE, TOKENS, N, SCORES)
    weights = gl.convert_layout(p.to(dtype), P)
    for tile in range(1, tiles):
        k_stage, k_phase = tile % STAGES, (tile // STAGES) & 1
        v_stage, v_phase = (tile - 1) % STAGES, ((tile - 1) // STAGES) & 1
        mbarrier.wait(k_full.index(k_stage), k_phase)
        if TURNS:
            mbarrier.wait(turns.index(me), ((tile - 1) & 1) ^ (1 - me))
        token = warpgroup_mma(
            mine, keys.index(k_stage).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(v_stage), v_phase)
        acc_token = warpgroup_mma(weights, values.index(v_stage), acc, is_async=True)
        if TURNS:
            mbarrier.arrive(turns.index(1 - me), count=1)
        scores = warpgroup_mma_wait(1, deps=(token,))
        mbarrier.arrive(k_empty.index(k_stage), count=1)
        p, best, total, shrunk = _softmax(scores, best, total, tile, held, SCALE, TOKENS, N, SCORES)
        total = _before_what_follows(total)
        acc = warpgroup_mma_wait(0, deps=(acc_token,))
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        acc = acc * gl.convert_layout(shrunk, gl.SliceLayout(1, RESULT))[:, None]
        weights = gl.convert_layout(p.to(dtype), P)
    v_stage, v_phase = (tiles - 1) % STAGES, ((tiles - 1) // STAGES) & 1
    mbarrier.wait(v_full.index(v_stage), v_phase)
    acc = warpgroup_mma(weights, values.index(v_stage), acc)
    result = acc / gl.convert_layout(total, gl.SliceLayout(1, RESULT))[:, None]
    query = first + 64 * me + gl.arange(0, 64, gl.SliceLayout(1, RESULT))
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, RESULT))
    places = query[:, None] * (HEADS * WIDTH) + column + channel[None, :]
    gl.store(out + places, result.to(out.dtype.element_ty), mask=(query < TOKENS)[:, None])


@gluon.jit
def _softmax(
    scores, best, total, tile, held,
    SCALE: gl.constexpr, TOKENS: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights of a tile, the highest score, the sum of weights, and how earlier ones shrink."""
    if TOKENS % N != 0:
        OWN: gl.constexpr = (TOKENS + N - 1) // N
        count = gl.where(tile < OWN, TOKENS - tile * N, held - (tile - OWN) * N)
        there = gl.arange(0, N, gl.SliceLayout(0, LAYOUT)) < count
        scores = gl.where(there[None, :], scores, float("-inf"))
    highest = gl.maximum(best, gl.max(scores, 1) * SCALE)
    p = gl.exp2(scores * SCALE - highest[:, None])
    shrunk = gl.exp2(best - highest)
    return p, highest, total * shrunk + gl.sum(p, 1), shrunk


@gluon.jit
def _before_what_follows(total):
    """The same sums, which the assembler computes before what follows.

    Otherwise it puts most of the softmax behind the wait for the products that it is to overlap
    with. It moves no store across a barrier, and it cannot know that no sum of weights is negative,
    so that nothing is ever stored.
    """
    same = gl.inline_asm_elementwise(
        """
        {
        .reg .pred negative;
        setp.lt.f32 negative, $1, 0f00000000;
        @negative st.shared.b32 [$1], $1;
        mov.b32 $0, $1;
        }
        """,
        "=r,r",
        [total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )
    _meet()
    return same
