"""Rounding a chunk's own keys and values to E4M3 in one launch; another makes the scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.triton_floats import decode_e4m3, magnitude_bits, round_e4m3
from lltk.ops.triton_rows import converts_e4m3, e4m3_codes

DECLARATION = Declaration(
    Exactness.BITWISE,
    "keys and values in one launch",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)

_TOKENS, _CHANNELS = 8, 1024
"""A program rounds so many channels of so many tokens."""


def fp8_write_own(
    k_decoded: Tensor,
    v_decoded: Tensor,
    v_largest: Tensor,
    k: Tensor,
    v: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    table: Tensor,
) -> Tensor:
    """See `reference.fp8_write_own`."""
    batch, pages, tokens, heads, width = k_decoded.shape
    channels = heads * width
    k, v = k.flatten(2), v.flatten(2)
    grid = (triton.cdiv(tokens, _TOKENS), triton.cdiv(channels, _CHANNELS), 2 * batch)
    peaks = torch.empty((batch, grid[0] * grid[1]), dtype=torch.int32, device=k.device)
    scale = v_largest.new_empty(())
    with torch.cuda.device_of(k):
        _round[grid](
            (k_decoded.view(torch.uint8), k, k.stride(0), k.stride(1), k_means),
            (v_decoded.view(torch.uint8), v, v.stride(0), v.stride(1), v_means),
            peaks,
            table,
            pages,
            tokens,
            channels,
            SLOTS=triton.next_power_of_2(pages),
            TOKENS=_TOKENS,
            CHANNELS=_CHANNELS,
            NATIVE=converts_e4m3(k.device),
        )
        _scale[(1,)](
            peaks,
            peaks.numel(),
            v_largest.view(torch.int32),
            table,
            batch,
            pages,
            scale,
            SLOTS=triton.next_power_of_2(pages),
            BLOCK=2048,
            num_warps=8,
        )
    return scale


@triton.jit
def _round(
    keys,
    values,
    peaks,
    table,
    pages,
    tokens,
    channels,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Round a tile of keys or of values; of values, keep the bits of the largest magnitude."""
    batch = tl.program_id(2) // 2
    if tl.program_id(2) % 2 == 0:
        _tile(keys, batch, table, pages, tokens, channels, SLOTS, TOKENS, CHANNELS, NATIVE)
    else:
        bits = _tile(values, batch, table, pages, tokens, channels, SLOTS, TOKENS, CHANNELS, NATIVE)
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = batch * programs + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(peaks + program, tl.max(tl.max(bits, 1), 0))


@triton.jit
def _tile(
    part,
    batch,
    table,
    pages,
    tokens,
    channels,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    decoded, own, batch_stride, token_stride, means = part
    slots = tl.arange(0, SLOTS)
    listed = tl.load(table + slots, mask=slots < pages - 1, other=0)
    first = batch.to(tl.int64) * pages
    free = first + pages * (pages - 1) // 2 - tl.sum(listed, 0)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None].to(tl.int64)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = (token < tokens) & (channel < channels)
    places = batch.to(tl.int64) * batch_stride + token * token_stride + channel
    values = tl.load(own + places, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + first * channels + channel, mask=channel < channels, other=0.0)
    values -= mean.to(tl.float32)
    places = (free * tokens + token) * channels + channel
    tl.store(decoded + places, e4m3_codes(values, NATIVE), mask=inside)
    return tl.where(inside, magnitude_bits(values), 0)


@triton.jit
def _scale(
    peaks,
    count,
    largest,
    table,
    batch,
    pages,
    scale,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """448 over the largest magnitude as E4M3 has it, of these and of the listed pages."""
    slots = tl.arange(0, SLOTS)
    inside = slots < pages - 1
    listed = tl.load(table + slots, mask=inside, other=0)
    bits = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        bits = tl.maximum(bits, tl.load(peaks + index, mask=index < count, other=0))
    most = tl.max(bits, 0)
    for clip in range(batch):
        held = tl.load(largest + clip * pages + listed, mask=inside, other=0)
        most = tl.maximum(most, tl.max(held, 0))
    value = most.to(tl.float32, bitcast=True)
    rounded = decode_e4m3(round_e4m3(tl.minimum(value, 448.0)))
    rounded = tl.where(value == value, rounded, value)
    tl.store(scale, tl.div_rn(1.0, tl.where(rounded == 0.0, 1.0, rounded)) * 448.0)
