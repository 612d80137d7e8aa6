"""Writing a page of the cache in NVFP4: sums for means, the heads' magnitudes, then the page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.floats import E4M3_MAX
from lltk.ops.hardware import has_e2m1
from lltk.ops.nvfp4_quantise.reference import BLOCK, FOUR_OVER_SIX_MAX
from lltk.ops.nvfp4_quantise.triton import (
    check_dtype,
    quantise_blocks,
    store_blocks,
    tensor_scales,
)
from lltk.ops.triton_floats import magnitude_bits

DECLARATION = Declaration(
    Exactness.BITWISE,
    "cvt.e2m1x2 where there is one and rounding is to nearest, else arithmetic",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)

_TOKENS, _CHANNELS = 64, 128
"""One program sums so many channels over so many tokens."""


def nvfp4_write_page(
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    value: Tensor,
    slot: Tensor,
    rule: str = "none",
) -> None:
    """See `reference.nvfp4_write_page`, which it equals bit by bit.

    Raises:
        ValueError: value is none of the dtypes that the kernels read.
    """
    check_dtype(value)
    batch, tokens, heads, width = value.shape
    rows = value.flatten(2)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    mean = None
    if means is not None:
        mean = _mean(rows).view(batch, heads, width).to(means.dtype)
        means.index_copy_(1, slot, mean.unsqueeze(1))
    largest = value.new_zeros((batch, heads), dtype=torch.float32)
    blocks = width // BLOCK
    amount = 256 if rule == "none" else 128
    grid = (triton.cdiv(tokens * blocks, amount), heads, batch)
    with torch.cuda.device_of(value):
        _largest[grid](
            rows, *rows.stride()[:2], mean, largest.view(torch.int32), tokens, blocks, AMOUNT=amount
        )
        _write[grid](
            codes,
            scales.view(torch.uint8),
            decode_scales,
            rows,
            *rows.stride()[:2],
            mean,
            largest,
            slot,
            codes.shape[1],
            tokens,
            blocks,
            TOP=E4M3_MAX if rule == "none" else FOUR_OVER_SIX_MAX,
            RULE=rule,
            AMOUNT=amount,
            NATIVE=has_e2m1(value.device),
            enable_fp_fusion=False,
        )


def _mean(rows: Tensor) -> Tensor:
    """The mean over the tokens of [B, T, C], float64 [B, C]."""
    batch, tokens, channels = rows.shape
    parts = triton.cdiv(tokens, _TOKENS)
    sums = rows.new_empty((batch, parts, channels), dtype=torch.float64)
    with torch.cuda.device_of(rows):
        _sums[(triton.cdiv(channels, _CHANNELS), parts, batch)](
            rows, *rows.stride()[:2], sums, tokens, channels, TOKENS=_TOKENS, CHANNELS=_CHANNELS
        )
    return sums.sum(1) / tokens


@triton.jit
def _sums(
    value,
    batch_stride,
    token_stride,
    sums,
    tokens,
    channels,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sum some channels over some tokens, in float64."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    batch = tl.program_id(2).to(tl.int64)
    inside = (token < tokens) & (channel < channels)[None, :]
    places = batch * batch_stride + token.to(tl.int64) * token_stride + channel[None, :]
    values = tl.load(value + places, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    place = (batch * tl.num_programs(1) + tl.program_id(1)) * channels + channel
    tl.store(sums + place, tl.sum(values, 0), mask=channel < channels)


@triton.jit
def _load(value, batch_stride, token_stride, mean, tokens, blocks, AMOUNT: tl.constexpr):
    """This program's blocks less their mean, float32 [AMOUNT, 16].

    Returns:
        The blocks, 0 where there are none; each one's place in a page; whether there is one.
    """
    index = tl.program_id(0) * AMOUNT + tl.arange(0, AMOUNT)
    inside = index < tokens * blocks
    head, heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    token, block = index // blocks, head * blocks + index % blocks
    element = tl.arange(0, 16)[None, :]
    own = batch * batch_stride + token.to(tl.int64) * token_stride + block * 16
    values = tl.load(value + own[:, None] + element, mask=inside[:, None], other=0.0)
    values = values.to(tl.float32)
    if mean is not None:
        at = (batch * heads * blocks + block)[:, None] * 16 + element
        values -= tl.load(mean + at, mask=inside[:, None], other=0.0).to(tl.float32)
    return values, token * heads * blocks + block, inside


@triton.jit
def _largest(
    value, batch_stride, token_stride, mean, largest, tokens, blocks, AMOUNT: tl.constexpr
):
    """Raise each head's ``largest`` to the bits of its magnitudes."""
    values, _, _ = _load(value, batch_stride, token_stride, mean, tokens, blocks, AMOUNT)
    head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.atomic_max(largest + head, tl.max(tl.max(magnitude_bits(values), 1), 0))


@triton.jit
def _write(
    codes,
    scales,
    decode_scales,
    value,
    batch_stride,
    token_stride,
    mean,
    largest,
    slot,
    pages,
    tokens,
    blocks,
    TOP: tl.constexpr,
    RULE: tl.constexpr,
    AMOUNT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    head, heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    page = batch.to(tl.int64) * pages + tl.load(slot)
    own = largest + batch * heads + head
    stores = tl.program_id(0) == 0
    tensor = tensor_scales(own, decode_scales + page * heads + head, stores, TOP)
    values, place, inside = _load(value, batch_stride, token_stride, mean, tokens, blocks, AMOUNT)
    scale, packed = quantise_blocks(values[None, :, :], place, tensor, None, 0, TOP, RULE, NATIVE)
    block = page * tokens * heads * blocks + place
    store_blocks(codes, scales, block, scale, packed, inside)
