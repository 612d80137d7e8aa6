"""The steps of `row_pipeline` in registers: each row is read once and written once.

NVFP4 needs the largest magnitude of the whole tensor before it can quantise. A first kernel finds
it and writes the sum, if that is kept. A second one computes the rows again and quantises them:
reading a row twice is cheaper than writing what lies between.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.floats import E4M3_MAX
from lltk.ops.hardware import has_e2m1
from lltk.ops.nvfp4_quantise.reference import FOUR_OVER_SIX_MAX, RULES
from lltk.ops.nvfp4_quantise.triton import (
    check_dtype,
    quantise_blocks,
    store_blocks,
    tensor_scales,
)
from lltk.ops.row_pipeline.op import new_results
from lltk.ops.triton_floats import magnitude_bits
from lltk.ops.triton_rows import (
    converts_e4m3,
    e4m3_codes,
    load_row,
    rounded,
    row_options,
    rows_of,
    store_fp8_row,
    store_piece,
)

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "a row a program; sums in another order, roots and exponentials approximated; NVFP4 by "
    "cvt.e2m1x2 where there is one, else arithmetic",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)
_A_WARP_OF_SUMS = 512
"""Elements that a warp holds of a sum whose norm is wanted."""
Operand = tuple[Tensor, int, int]
"""A tensor [G, D], its stride from row to row, and how many rows of x share one of its rows."""


def row_pipeline(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
    activation: str | None = None,
    to: str = "plain",
    rule: str = "none",
    keep_sum: bool = False,
) -> list[Tensor]:
    """`reference.row_pipeline`, with sums taken in another order.

    A product and the sum that it goes into may be rounded once, and exponentials and roots are
    approximated. For NVFP4 only exponentials are.

    Raises:
        ValueError: ``to`` is "nvfp4", and x has a dtype that its kernels do not read.
    """
    results = new_results(
        x,
        y=y,
        gate=gate,
        scale=scale,
        shift=shift,
        eps=eps,
        activation=activation,
        to=to,
        rule=rule,
        keep_sum=keep_sum,
    )
    width = x.shape[-1]
    rows = x.numel() // width
    operands = tuple(_operand(given, rows, width) for given in (x, y, gate, scale, shift))
    total = results[-1] if keep_sum else None
    normed_sum = y is not None and scale is not None
    sizes = row_options(width, _A_WARP_OF_SUMS) if normed_sum else row_options(width)
    options = {**sizes, "GELU": activation == "gelu"}
    with torch.cuda.device_of(x):
        if to == "nvfp4":
            check_dtype(x)
            _quantise_nvfp4(operands, width, eps, total, results, rule, options)
        else:
            out, scales = results[:2] if to == "fp8" else (results[0], None)
            _write[(rows,)](
                operands,
                width,
                eps,
                total,
                out.view(torch.uint8) if to in ("fp8", "e4m3") else out,
                scales,
                NATIVE=converts_e4m3(x.device),
                **options,
            )
    return results


def _operand(given: Tensor | None, rows: int, width: int) -> Operand | None:
    if given is None:
        return None
    own = rows_of(given, width)
    return own, own.stride(0), rows // own.shape[0]


def _quantise_nvfp4(
    operands: tuple[Operand | None, ...],
    width: int,
    eps: float | None,
    total: Tensor | None,
    results: list[Tensor],
    rule: str,
    options: dict[str, Any],
) -> None:
    """Launch both kernels."""
    assert rule in RULES, rule
    codes, scales, decode_scale = results[:3]
    rows = codes.shape[:-1].numel()
    largest = torch.zeros_like(decode_scale)
    piece = triton.next_power_of_2(codes.shape[-1] * 2)
    whole = {"PIECE": piece, "PIECES": 1, "num_warps": min(max(piece // 512, 1), 16)}
    options = {**options, **whole, "enable_fp_fusion": False}
    _find_largest[(rows,)](operands, width, eps, total, largest.view(torch.int32), **options)
    if total is not None:
        operands = (_operand(total, rows, width), None, None, *operands[3:])
    _write_nvfp4[(rows,)](
        operands,
        width,
        eps,
        codes,
        scales.view(torch.uint8),
        largest,
        decode_scale,
        TOP=E4M3_MAX if rule == "none" else FOUR_OVER_SIX_MAX,
        RULE=rule,
        NATIVE=has_e2m1(codes.device),
        **options,
    )


@triton.jit
def _write(
    operands,
    width,
    eps,
    total,
    out,
    scales,
    GELU: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Write rows as FP8 with their scales; without scales, as bytes of E4M3 or plainly."""
    row = tl.program_id(0)
    pieces = _steps(operands, row, width, eps, total, GELU, False, PIECE, PIECES, NATIVE)
    if scales is not None:
        store_fp8_row(out, scales, row, pieces, width, PIECE, PIECES, NATIVE)
    else:
        for index in tl.static_range(PIECES):
            values = pieces[index]
            if out.dtype.element_ty == tl.uint8:
                values = e4m3_codes(values, NATIVE)
            store_piece(out, row, index, values, width, PIECE, PIECES)


@triton.jit
def _find_largest(
    operands,
    width,
    eps,
    total,
    largest,
    GELU: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Raise ``largest`` to the bits of the magnitudes in a row."""
    row = tl.program_id(0)
    (values,) = _steps(operands, row, width, eps, total, GELU, True, PIECE, PIECES, False)
    tl.atomic_max(largest, tl.max(magnitude_bits(values), 0))


@triton.jit
def _write_nvfp4(
    operands,
    width,
    eps,
    codes,
    scales,
    largest,
    decode_scale,
    GELU: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    TOP: tl.constexpr,
    RULE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    blocks: tl.constexpr = PIECE // 16
    # Backwards: the rows that the first kernel read last are still in the cache.
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    tensor = tensor_scales(largest, decode_scale, tl.program_id(0) == 0, TOP)
    (values,) = _steps(operands, row, width, eps, None, GELU, True, PIECE, PIECES, False)
    values = tl.reshape(values, (1, blocks, 16))
    local = tl.arange(0, blocks)
    block = row.to(tl.int64) * (width // 16) + local
    scale, packed = quantise_blocks(values, block[None, :], tensor, None, 0, TOP, RULE, NATIVE)
    store_blocks(codes, scales, block, scale, packed, local < width // 16)


@triton.jit
def _steps(
    operands,
    row,
    width,
    eps,
    total,
    GELU: tl.constexpr,
    EXACT: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """What the steps make of a row, rounded to x's dtype after each; stores the sum.

    Args:
        operands: x, y, gate, scale and shift, each an `Operand` or None.
        total: where the sum goes, or None.
        EXACT: whether divisions and roots of the norm are rounded to nearest.
        NATIVE: as `rounded` has it.

    Returns:
        Pieces of float32, 0 beyond ``width``.
    """
    x, y, gate, scale, shift = operands
    kind: tl.constexpr = x[0].dtype.element_ty
    pieces = _load(x, row, width, PIECE, PIECES)
    if y is not None:
        pieces = _add(pieces, y, gate, row, width, kind, PIECE, PIECES, NATIVE)
        if total is not None:
            for index in tl.static_range(PIECES):
                store_piece(total, row, index, pieces[index], width, PIECE, PIECES)
    if scale is not None:
        if EXACT:
            # Read late, as exact divisions and NVFP4 need the registers.
            pieces = _norm(pieces, width, eps, shift is not None, EXACT, PIECE, PIECES)
        scales = _load(scale, row, width, PIECE, PIECES)
        if shift is not None:
            shifts = _load(shift, row, width, PIECE, PIECES)
        if not EXACT:
            # Read first, so that the sums do not wait for it.
            pieces = _norm(pieces, width, eps, shift is not None, EXACT, PIECE, PIECES)
        normed = ()
        for index in tl.static_range(PIECES):
            values = pieces[index] * scales[index]
            if shift is not None:
                values += shifts[index]
            normed += (rounded(values, kind, NATIVE),)
        pieces = normed
    if GELU:
        activated = ()
        for index in tl.static_range(PIECES):
            activated += (rounded(_gelu(pieces[index], NATIVE), kind, NATIVE),)
        pieces = activated
    return pieces


@triton.jit
def _load(operand, row, width, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """The row of an operand that belongs to a row of x, in pieces; 0 beyond ``width``."""
    pointer, stride, together = operand
    return load_row(pointer, (row // together).to(tl.int64) * stride, width, PIECE, PIECES)


@triton.jit
def _add(
    pieces,
    y,
    gate,
    row,
    width,
    KIND: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """x + gate · y, or x + y."""
    added = _load(y, row, width, PIECE, PIECES)
    if gate is not None:
        gates = _load(gate, row, width, PIECE, PIECES)
    sums = ()
    for index in tl.static_range(PIECES):
        values = added[index]
        if gate is not None:
            values *= gates[index]
        sums += (rounded(pieces[index] + values, KIND, NATIVE),)
    return sums


@triton.jit
def _norm(
    pieces,
    width,
    eps,
    CENTRES: tl.constexpr,
    EXACT: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """x / √(mean of x² + eps) of a row in pieces, of x less its mean if it CENTRES."""
    if CENTRES:
        total = pieces[0]
        for index in tl.static_range(1, PIECES):
            total += pieces[index]
        mean = _mean(total, width, EXACT)
    squares = tl.zeros_like(pieces[0])
    centred = ()
    for index in tl.static_range(PIECES):
        values = pieces[index]
        if CENTRES:
            values -= mean
            if PIECES == 1:
                values = tl.where(tl.arange(0, PIECE) < width, values, 0.0)
        squares += values * values
        centred += (values,)
    variance = _mean(squares, width, EXACT)
    normed = ()
    for index in tl.static_range(PIECES):
        if EXACT:
            normed += (tl.div_rn(centred[index], tl.sqrt_rn(variance + eps)),)
        else:
            normed += (centred[index] * tl.rsqrt(variance + eps),)
    return normed


@triton.jit
def _mean(values, width, EXACT: tl.constexpr):
    total = tl.sum(values, 0)
    return tl.div_rn(total, width.to(tl.float32)) if EXACT else total / width


@triton.jit
def _gelu(values, NATIVE: tl.constexpr):
    # (1 + tanh(u)) / 2 = 1 / (1 + exp(−2u)), here as a power of 2; 2 √(2/π) log₂ e = 2.3022…
    power = values * (-2.302208198144325 - 0.10294324008002367 * values * values)
    return values * _logistic(power, NATIVE)


@triton.jit
def _logistic(power, NATIVE: tl.constexpr):
    """1 / (1 + 2 ** power)."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            """
            ex2.approx.ftz.f32 $0, $1;
            add.ftz.f32 $0, $0, 0f3F800000;
            rcp.approx.ftz.f32 $0, $0;
            """,
            "=f,f",
            [power],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp2(power))
