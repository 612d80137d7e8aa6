"""Attention that decodes tiles of pages as it reads them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.nvfp4_quantise.reference import BLOCK

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "decodes tiles of pages as it attends",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    in_place=True,
)

_LOG2_E = 1.4426950408889634


@triton.jit
def _e2m1(codes):
    """2**-14 times the values of codes, by moving their bits to the places that float16 has."""
    codes = codes.to(tl.uint16)
    return (((codes & 7) << 9) | ((codes & 8) << 12)).to(tl.float16, bitcast=True)


@triton.jit
def block_values(codes, scales, rows, held, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """2**-14 · e2m1(code) · scale of rows of a page, float16 [ROWS, WIDTH]: exact.

    Args:
        codes, scales: pointers to the page's first row.
        rows: int [ROWS], rows from there, WIDTH / 2 and WIDTH / 16 bytes each.
        held: bool [ROWS], the rows to read; 0 for others.
    """
    places = rows[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
    packed = tl.load(codes + places, mask=held[:, None], other=0)
    values = tl.interleave(_e2m1(packed & 15), _e2m1(packed >> 4))
    places = rows[:, None] * (WIDTH // 16) + tl.arange(0, WIDTH // 16)[None, :]
    bits = tl.load(scales + places, mask=held[:, None], other=0).to(tl.uint16)
    # E4M3's bits moved to float16's places. float16's exponent has a bias that is larger by 8. No
    # scale is negative.
    scale = (bits << 7).to(tl.float16, bitcast=True) * 256.0
    blocks = tl.reshape(values, (ROWS, WIDTH // 16, 16)) * scale.to(tl.float16)[:, :, None]
    return tl.reshape(blocks, (ROWS, WIDTH))


@triton.jit
def _attend(scores, values, seen, total, best, acc, factor, PRECISION: tl.constexpr):
    """One tile of the online softmax; ``scores`` are exponents of 2, ``values`` are [N, D]."""
    scores = tl.where(seen[None, :], scores, float("-inf"))
    highest = tl.maximum(best, tl.max(scores, 1))
    p = tl.exp2(scores - highest[:, None])
    shrunk = tl.exp2(best - highest)
    weight = tl.sum(p, 1)
    product = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    return weight, total * shrunk + weight, highest, acc * shrunk[:, None] + product * factor


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    k_codes, k_scales, k_decode_scales, k_means,
    v_codes, v_scales, v_decode_scales, v_means,
    table, listed, pages, tokens, queries, owned, heads, scale,
    q_batch, q_token, q_head,
    k_batch, k_token, k_head,
    v_batch, v_token, v_head,
    WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K_MEANS: tl.constexpr, V_MEANS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M queries of one head over the listed pages, tile by tile, then over the chunk's own keys.

    Products take codes times block scales, which 8 bits hold exactly. A page's decode scales
    multiply the sums. The mean of its keys adds one number to all scores of a query, and the mean
    of its values one vector to each result.
    """
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    asked = (query < queries)[:, None]
    places = batch.to(tl.int64) * q_batch + head * q_head
    places += query[:, None].to(tl.int64) * q_token + channel[None, :]
    q = tl.load(q_ptr + places, mask=asked, other=0.0)
    best = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WIDTH), tl.float32)
    for index in range(listed):
        page = batch.to(tl.int64) * pages + tl.load(table + index)
        first = page * tokens * heads + head
        k_factor = tl.load(k_decode_scales + page * heads + head) * 16384.0 * scale
        v_factor = tl.load(v_decode_scales + page * heads + head) * 16384.0
        offset = tl.zeros((M,), tl.float32)
        if K_MEANS:
            mean = tl.load(k_means + (page * heads + head) * WIDTH + channel).to(tl.float32)
            offset = tl.sum(q.to(tl.float32) * mean[None, :], 1) * scale
        if V_MEANS:
            v_mean = tl.load(v_means + (page * heads + head) * WIDTH + channel).to(tl.float32)
        for start in range(0, tokens, N):
            token = start + tl.arange(0, N)
            seen = token < tokens
            rows = token * heads
            keys = block_values(
                k_codes + first * (WIDTH // 2), k_scales + first * (WIDTH // 16),
                rows, seen, WIDTH, N,
            ).to(q.dtype)  # fmt: skip
            scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
            scores = scores * k_factor + offset[:, None]
            values = block_values(
                v_codes + first * (WIDTH // 2), v_scales + first * (WIDTH // 16),
                rows, seen, WIDTH, N,
            ).to(q.dtype)  # fmt: skip
            weight, total, best, acc = _attend(
                scores, values, seen, total, best, acc, v_factor, PRECISION
            )
            if V_MEANS:
                acc += weight[:, None] * v_mean[None, :]
    for start in range(0, owned, N):
        token = start + tl.arange(0, N)
        seen = token < owned
        far = token[:, None].to(tl.int64)
        k_places = batch.to(tl.int64) * k_batch + head * k_head + far * k_token + channel[None, :]
        keys = tl.load(k_ptr + k_places, mask=seen[:, None], other=0.0)
        v_places = batch.to(tl.int64) * v_batch + head * v_head + far * v_token + channel[None, :]
        values = tl.load(v_ptr + v_places, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        weight, total, best, acc = _attend(scores, values, seen, total, best, acc, 1.0, PRECISION)
    places = ((batch.to(tl.int64) * queries + query[:, None]) * heads + head) * WIDTH
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places + channel[None, :], result, mask=asked)


def nvfp4_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    k_decode_scales: Tensor,
    k_means: Tensor | None,
    v_codes: Tensor,
    v_scales: Tensor,
    v_decode_scales: Tensor,
    v_means: Tensor | None,
    table: Tensor,
) -> Tensor:
    """`reference.nvfp4_paged_attention`, with pages decoded tile by tile; no gradient.

    Raises:
        ValueError: D is no power of two, or a gradient is wanted.
    """
    check_width(q)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError(
            "nvfp4_paged_attention: triton has no gradient; set nvfp4_paged_attention of the "
            "recipe's lower pass to decode"
        )
    return _attention(
        q,
        k,
        v,
        k_codes,
        k_scales,
        k_decode_scales,
        k_means,
        v_codes,
        v_scales,
        v_decode_scales,
        v_means,
        table,
    )


def check_width(q: Tensor) -> None:
    width = q.shape[-1]
    if width % BLOCK or width & (width - 1):
        raise ValueError(
            f"nvfp4_paged_attention: triton is for heads of 16, 32, 64, …, not of {width}; set "
            "nvfp4_paged_attention of the recipe's lower pass to decode"
        )


@torch.library.custom_op("lltk::nvfp4_paged_attention_triton", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    k_decode_scales: Tensor,
    k_means: Tensor | None,
    v_codes: Tensor,
    v_scales: Tensor,
    v_decode_scales: Tensor,
    v_means: Tensor | None,
    table: Tensor,
) -> Tensor:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    batch, queries, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile_m, tile_n, warps = (128, 64, 8) if q.dtype.itemsize == 2 else (32, 32, 4)
    with torch.cuda.device_of(q):
        attention_kernel[(triton.cdiv(queries, tile_m), batch * heads)](
            q, k, v, out,
            k_codes, k_scales.view(torch.uint8), k_decode_scales, k_means,
            v_codes, v_scales.view(torch.uint8), v_decode_scales, v_means,
            table, table.shape[0], k_codes.shape[1], k_codes.shape[2], queries, k.shape[1], heads,
            width**-0.5 * _LOG2_E,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            WIDTH=width, M=tile_m, N=tile_n,
            K_MEANS=k_means is not None, V_MEANS=v_means is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=warps, num_stages=1,
        )  # fmt: skip
    return out


@_attention.register_fake
def _(q: Tensor, *rest: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)
