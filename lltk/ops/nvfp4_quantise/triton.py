"""NVFP4 quantisation in two kernels: the largest magnitude, then scales and codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.floats import E4M3_MAX
from lltk.ops.hardware import has_e2m1
from lltk.ops.nvfp4_quantise.op import new_nvfp4
from lltk.ops.nvfp4_quantise.reference import BLOCK, FOUR_OVER_SIX_MAX, RULES, Quantised
from lltk.ops.triton_floats import (
    decode_e4m3,
    is_finite,
    magnitude_bits,
    nearest_e2m1,
    pack,
    pairs,
    reciprocal,
    round_e2m1,
    round_e2m1_pairs,
    round_e2m1_randomly,
    round_e4m3,
    round_e4m3_up,
)

DECLARATION = Declaration(
    Exactness.BITWISE,
    "cvt.e2m1x2 where there is one and rounding is to nearest, else arithmetic",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STEP, _STEPS = 4096, 4
_FLT_MAX = tl.constexpr(torch.finfo(torch.float32).max)


def nvfp4_quantise(
    x: Tensor,
    tile: int = 1,
    rule: str = "none",
    seed: Tensor | None = None,
    stream: int = 0,
    largest: Tensor | None = None,
    run: int = 0,
) -> Quantised:
    """See the op, which it equals bit by bit where no element exceeds ``largest``.

    Raises:
        ValueError: x is none of `DTYPES`.
    """
    assert rule in RULES and tile in (1, BLOCK), (rule, tile)
    check_dtype(x)
    x = x.contiguous()
    codes, scales, decode_scale = new_nvfp4(x)
    own = torch.zeros_like(decode_scale) if largest is None else largest.contiguous()
    width, blocks = x.shape[-1], scales.shape[-1]
    # Only tiles depend on where a matrix ends. If rows are whole blocks, rows do not matter either.
    rows = x.numel() // width if tile == 1 or x.dim() == 1 else x.shape[-2]
    matrices = x.numel() // (rows * width)
    run *= blocks
    if tile == 1 and width % BLOCK == 0:
        rows, width, blocks = rows * blocks, BLOCK, 1
    bands = triton.cdiv(rows, tile)
    total = matrices * bands * blocks
    amount = 16 if tile == BLOCK else 256 if rule == "none" and seed is None else 128
    with torch.cuda.device_of(x):
        if largest is None:
            find_largest(x, own)
        _quantise[(triton.cdiv(total, amount),)](
            x,
            codes,
            scales.view(torch.uint8),
            own,
            decode_scale,
            seed,
            stream,
            rows,
            width,
            blocks,
            bands,
            total,
            TOP=E4M3_MAX if rule == "none" else FOUR_OVER_SIX_MAX,
            RULE=rule,
            TILE=tile,
            RUN=run,
            AMOUNT=amount,
            NATIVE=has_e2m1(x.device),
            enable_fp_fusion=False,
        )
    return Quantised(codes, scales, decode_scale)


def find_largest(x: Tensor, found: Tensor) -> None:
    """Raise a float32 [] to the largest magnitude in x, which is contiguous."""
    with torch.cuda.device_of(x):
        _largest[(triton.cdiv(x.numel(), _STEP * _STEPS),)](
            x, found.view(torch.int32), x.numel(), STEP=_STEP, STEPS=_STEPS
        )


def check_dtype(x: Tensor) -> None:
    """Raise ValueError if the kernels do not read x."""
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"nvfp4_quantise: triton reads {names}, not {x.dtype}: cast it first")


@triton.jit
def _largest(x, largest, numel, STEP: tl.constexpr, STEPS: tl.constexpr):
    """Raise ``largest`` to the bits of the magnitudes in x."""
    first = tl.program_id(0).to(tl.int64) * (STEP * STEPS)
    found = tl.zeros((STEP,), tl.int32)
    for step in tl.static_range(STEPS):
        at = first + step * STEP + tl.arange(0, STEP)
        values = tl.load(x + at, mask=at < numel, other=0.0).to(tl.float32)
        found = tl.maximum(found, magnitude_bits(values))
    tl.atomic_max(largest, tl.max(found, 0))


@triton.jit(do_not_specialize=["stream"])
def _quantise(
    x,
    codes,
    scales,
    own,
    decode_scale,
    seed,
    stream,
    rows,
    width,
    blocks,
    bands,
    total,
    TOP: tl.constexpr,
    RULE: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    AMOUNT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    # Backwards: the elements that the first kernel read last are still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tensor = tensor_scales(own, decode_scale, program == 0, TOP)
    index = program * AMOUNT + tl.arange(0, AMOUNT)
    band, column = index // blocks, index % blocks
    if TILE > 1:
        matrix, band = (band // bands).to(tl.int64), band % bands
    local = (band * TILE)[None, :] + tl.arange(0, TILE)[:, None]
    row = (matrix * rows)[None, :] + local if TILE > 1 else local.to(tl.int64)
    inside = (local < rows) & (index < total)[None, :]
    element = tl.arange(0, 16)[None, None, :]
    values = tl.load(
        x + row[:, :, None] * width + (column[None, :, None] * 16 + element),
        mask=inside[:, :, None] & (column[None, :, None] * 16 + element < width),
        other=0.0,
    )
    block = row * blocks + column[None, :]
    scale, packed = quantise_blocks(
        values.to(tl.float32), block, tensor, seed, stream, TOP, RULE, NATIVE, RUN
    )
    tl.store(scales + block, tl.broadcast_to(scale[None, :], (TILE, AMOUNT)), mask=inside)
    byte = tl.arange(0, 8)[None, None, :]
    tl.store(codes + (block[:, :, None] * 8 + byte), packed, mask=inside[:, :, None])


@triton.jit
def tensor_scales(own, decode_scale, stores, TOP: tl.constexpr):
    """Whether a tensor is finite; its largest magnitude, encode scale and decode scale.

    The one program that ``stores`` writes the decode scale.
    """
    finite = is_finite(tl.load(own))
    largest = tl.where(finite, tl.load(own), 0.0)
    encode = tl.minimum(tl.div_rn(6.0 * TOP, largest), _FLT_MAX)
    encode = tl.where(largest == 0.0, 1.0, encode)
    decode = tl.div_rn(1.0, encode)
    if stores:
        tl.store(decode_scale, tl.where(finite, decode, float("nan")))
    return finite, largest, encode, decode


@triton.jit
def quantise_blocks(
    values,
    block,
    tensor,
    seed,
    stream,
    TOP: tl.constexpr,
    RULE: tl.constexpr,
    NATIVE: tl.constexpr,
    RUN: tl.constexpr = 0,
):
    """Scales and codes of blocks.

    Args:
        values: float32 [T, N, 16], T blocks sharing a scale; infinities and NaN count as 0.
        block: int64 [T, N], the place of each among all blocks.
        tensor: what `tensor_scales` returned.
        seed: pointer to an int64 [2], or [4] of a rank's part; or None to round to nearest.
        stream, TOP, RULE: as of `nvfp4_quantise`.
        NATIVE: whether there is an instruction for E2M1.
        RUN: how many blocks follow one another in a tensor that several ranks share; 0 if none do.

    Returns:
        uint8 [N] and [T, N, 8].
    """
    finite, largest, encode, decode = tensor
    if not finite:
        values = tl.where(is_finite(values), values, 0.0)
    peak = tl.max(tl.max(tl.abs(values), 2), 0)
    fine = peak * (encode * (1 / 6)) if RULE == "none" else tl.div_rn(peak, 6.0) * encode
    scale = round_e4m3(tl.minimum(fine, 448.0))
    if RULE != "none":
        coarse = round_e4m3(tl.minimum(fine * 1.5, 448.0))
        unit = _unit(largest)
        reach = tl.where(encode < _FLT_MAX, largest, decode * (6.0 * TOP))
        chosen = _error(values, coarse, decode, unit, unit * reach, TOP, RULE) < _error(
            values, scale, decode, unit, unit * reach, TOP, RULE
        )
    if seed is not None:
        scale = round_e4m3_up(tl.minimum(fine, 448.0))
    if RULE != "none":
        scale = tl.where(chosen, coarse, scale)
    scaled = _scaled(values, decode_e4m3(scale), decode)
    if seed is not None:
        packed = pack(round_e2m1_randomly(scaled, _uniform(block, seed, stream, RUN)))
    elif NATIVE:
        even, odd = pairs(scaled)
        packed = round_e2m1_pairs(even, odd)
    else:
        packed = pack(round_e2m1(scaled))
    return scale.to(tl.uint8), packed


@triton.jit
def store_blocks(codes, scales, block, scale, packed, inside):
    """Store what `quantise_blocks` returned of blocks [1, N], at ``block`` [N] where ``inside``."""
    tl.store(scales + block, scale, mask=inside)
    byte = tl.arange(0, 8)[None, :]
    packed = tl.reshape(packed, (block.shape[0], 8))
    tl.store(codes + block[:, None] * 8 + byte, packed, mask=inside[:, None])


@triton.jit
def _scaled(values, scale, decode):
    return values * reciprocal(scale * decode)[None, :, None]


@triton.jit
def _unit(largest):
    """2**-e of a largest m · 2**e, ½ ≤ m < 1, e within ±126; 1 of zero."""
    exponent = tl.minimum((largest.to(tl.int32, bitcast=True) >> 23) - 126, 126)
    unit = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest == 0.0, 1.0, unit)


@triton.jit
def _error(values, code, decode, unit, reach, TOP: tl.constexpr, RULE: tl.constexpr):
    """What rounding to nearest loses in blocks, in units."""
    scale = decode_e4m3(code)
    decoded = nearest_e2m1(_scaled(values, scale, decode)) * scale[None, :, None] * reach
    lost = tl.abs(tl.div_rn(decoded, 6.0 * TOP) - values * unit)
    if RULE == "abs_max":
        return tl.max(tl.max(lost, 2), 0)
    if RULE == "mse":
        lost = lost * lost
    total = _row_sum(lost)
    if total.shape[0] == 16:
        for _ in tl.static_range(4):
            # Of two numbers, in either order.
            total = tl.sum(tl.reshape(total, (2, total.shape[0] // 2, total.shape[1])), 0)
    return tl.reshape(total, (total.shape[1],))


@triton.jit
def _row_sum(x):
    """Sum of 16 elements in order, [T, N, 16] to [T, N]."""
    parts = (tl.reshape(x, (x.shape[0], x.shape[1], 2, 2, 2, 2)),)
    for stage in tl.static_range(4):
        # Splits by an index's lowest bit that is left, so that parts come in order.
        evens, odds = (), ()
        for index in tl.static_range(1 << stage):
            even, odd = tl.split(parts[index])
            evens, odds = evens + (even,), odds + (odd,)
        parts = evens + odds
    total = parts[0]
    for index in tl.static_range(1, 16):
        total += parts[index]
    return total


@triton.jit
def _uniform(block, seed, stream, RUN: tl.constexpr):
    """Random numbers of blocks, see `lltk.ops.philox.uniform`; float32 [T, N, 16]."""
    if RUN > 0:
        rank, ranks = tl.load(seed + 2), tl.load(seed + 3)
        block = (block // RUN * ranks + rank) * RUN + block % RUN
    quad = block[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    low, high = quad.to(tl.uint32), (quad >> 32).to(tl.uint32)
    draw = tl.zeros_like(low) + tl.load(seed + 1).to(tl.uint32)
    sequence = tl.zeros_like(low) + stream.to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), low, high, draw, sequence)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (words >> 8).to(tl.float32) * 2.0**-24
