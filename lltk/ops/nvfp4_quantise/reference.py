"""NVFP4 quantisation: E2M1 codes, an E4M3 scale a block of 16, one float32 scale a tensor.

x̂ = e2m1(code) · scale · decode scale. The order of operations is that of TransformerEngine's
reference, so that results agree bit by bit. Where that order loses precision or overflows, the text
says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lltk.ops.floats import (
    E2M1_MAX,
    E4M3_MAX,
    decode_e2m1,
    pack,
    reciprocal,
    round_e2m1,
    round_e2m1_randomly,
    round_e4m3,
    round_e4m3_up,
)
from lltk.ops.philox import uniform

BLOCK = 16
"""Elements that share a scale, along the last axis."""
RULES = ("none", "mse", "mae", "abs_max")
"""What Four Over Six minimises; "none" is plain NVFP4."""
FOUR_OVER_SIX_MAX = 256.0
"""Largest block scale under Four Over Six: 1.5 times it is an E4M3 number too."""
_FLT_MAX = torch.finfo(torch.float32).max


class Quantised(NamedTuple):
    """A tensor in NVFP4.

    Attributes:
        codes: uint8 [..., R, K/2], two E2M1 codes a byte, the even element in the low nibble; K is
            padded to whole blocks.
        scales: float8_e4m3fn [..., R, K/16], never NaN.
        decode_scale: float32 [], or of the batch axes; NaN where the input is not finite: a flag
            that every reader passes on.
    """

    codes: Tensor
    scales: Tensor
    decode_scale: Tensor


def amax(x: Tensor, axes: int = 0) -> Tensor:
    """Largest magnitude, float32: of the whole tensor, or a number for each of the first axes."""
    return x.abs().flatten(axes).amax(-1).float()


def scales_of(largest: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """A tensor's encode scale, min(6·top / amax, FLT_MAX) or 1 for zeros, and its decode scale.

    The decode scale is 1 / encode scale, of the clamped scale, so that tiny tensors survive.
    """
    # A tensor divided by a tensor: a number divided by one would be a product with its reciprocal.
    encode = (torch.full_like(largest, E2M1_MAX * top) / largest).clamp(max=_FLT_MAX)
    encode = torch.where(largest == 0, 1.0, encode)
    return encode, 1 / encode


def nvfp4_quantise(
    x: Tensor,
    tile: int = 1,
    rule: str = "none",
    seed: Tensor | None = None,
    stream: int = 0,
    largest: Tensor | None = None,
    top: float | None = None,
    run: int = 0,
) -> Quantised:
    """A tensor in NVFP4; blocks lie along the last axis, which is padded with zeros.

    Round to nearest: a block's scale is e4m3(b · (S / 6)), b its largest magnitude and S the
    encode scale; a code is e2m1(x / (scale · decode scale)). Under Four Over Six the scale is
    e4m3((b / 6) · S), or e4m3(1.5 · (b / 6) · S), which maps the maximum to 4, where that makes the
    rule's error smaller.

    Stochastic rounding is unbiased: a scale that maps a maximum to 6 is rounded up, so that nothing
    saturates, and Four Over Six chooses by the error of rounding to nearest.

    Args:
        x: [..., R, K], floating point; [K] counts as one row.
        tile: rows that share a scale: 1, or 16 for weights, whose transpose has the same values.
        rule: one of `RULES`.
        seed: for stochastic rounding; see `lltk.ops.philox.uniform`.
        stream: random sequence of ``seed``.
        largest: magnitudes that the elements do not exceed, float32 of the leading axes. Each of
            their entries then has a decode scale of its own; by default there is one for all. One
            that is not finite gives a decode scale of NaN, as such an element does.
        top: largest block scale; by default 448, and 256 under Four Over Six.
        run: how many elements of the padded rows, in their order, follow one another in a tensor
            that several ranks share; see `lltk.ops.philox.uniform`.
    """
    assert rule in RULES and tile in (1, BLOCK), (rule, tile)
    own = amax(x, 0 if largest is None else largest.dim())
    finite = own.isfinite() if largest is None else own.isfinite() & largest.isfinite()
    largest = torch.where(finite, own if largest is None else largest, 0.0)
    top = top or (E4M3_MAX if rule == "none" else FOUR_OVER_SIX_MAX)
    encode, decode = scales_of(largest, top)
    rows = x.shape[-2] if x.dim() > 1 else 1
    blocks = _blocks(torch.where(x.isfinite(), x, 0.0).float(), tile)
    peak = blocks.abs().amax((-1, -3), keepdim=True)
    wide, inverse = (expand(s, peak.dim()) for s in (encode, decode))
    if rule == "none":
        fine = peak * (wide * (1 / 6))
    else:
        fine = peak / torch.full_like(peak, E2M1_MAX) * wide
    scales = round_e4m3(fine) if seed is None else round_e4m3_up(fine)
    if rule != "none":
        unit = _unit(largest)
        # Where the encode scale was clamped, 6·top does not stand for the tensor's amax.
        reach = torch.where(encode < _FLT_MAX, largest, decode * (E2M1_MAX * top))
        units = [expand(u, peak.dim()) for u in (unit, unit * reach)]
        coarse = round_e4m3(fine * 1.5)
        four, six = (
            _error(blocks, s, inverse, units, top, rule) for s in (coarse, round_e4m3(fine))
        )
        scales = torch.where(four < six, coarse.float(), scales.float()).to(torch.float8_e4m3fn)
    values = _scaled(blocks, scales, inverse)
    values = values.flatten(-2).flatten(-3, -2)[..., :rows, :]
    if seed is None:
        codes = round_e2m1(values)
    else:
        codes = round_e2m1_randomly(values, uniform(seed, stream, tuple(values.shape), run))
    scales = scales.view(torch.uint8).expand(*scales.shape[:-3], tile, *scales.shape[-2:])
    scales = scales.squeeze(-1).flatten(-3, -2)[..., :rows, :].contiguous()
    shape = x.shape[:-1]
    return Quantised(
        pack(codes).reshape(*shape, -1),
        scales.view(torch.float8_e4m3fn).reshape(*shape, -1),
        torch.where(finite, decode, torch.nan),
    )


def expand(scale: Tensor, dims: int) -> Tensor:
    """A scale of the leading axes with as many axes as the tensor it scales."""
    return scale[(..., *[None] * (dims - scale.dim()))]


def _blocks(x: Tensor, tile: int) -> Tensor:
    """[..., R, K] → [..., R / tile, tile, K / 16, 16], padded with zeros."""
    x = x if x.dim() > 1 else x[None]
    x = pad(x, (0, -x.shape[-1] % BLOCK, 0, -x.shape[-2] % tile))
    return x.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, tile))


def _scaled(blocks: Tensor, scales: Tensor, decode: Tensor) -> Tensor:
    """The blocks in units of E2M1, within ±6."""
    return (blocks * reciprocal(scales.float() * decode)).clamp(-E2M1_MAX, E2M1_MAX)


def _unit(largest: Tensor) -> Tensor:
    """The power of two that brings a tensor near 1.

    Squares of float32 leave its range below 1e-21 and above 1e19. So errors are compared in units
    of this power of two, which changes no rounding.
    """
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), -exponent.clamp(-126, 126))


def _error(
    blocks: Tensor, scales: Tensor, decode: Tensor, units: list[Tensor], top: float, rule: str
) -> Tensor:
    """The error of a block x that is rounded to nearest, in the units of `_unit`, by a rule.

    The difference of a value is code · scale · amax / (6·top) − x. The rule ``abs_max`` takes the
    largest. For the others, differences are summed along each row in order; then the upper half of
    the rows is added to the lower until one row is left.
    """
    unit, largest = units
    codes = round_e2m1(_scaled(blocks, scales, decode))
    decoded = decode_e2m1(codes) * scales.float() * largest
    lost = decoded / torch.full_like(decoded, E2M1_MAX * top) - blocks * unit
    if rule == "abs_max":
        return lost.abs().amax((-1, -3), keepdim=True)
    lost = lost.square() if rule == "mse" else lost.abs()
    total = torch.zeros_like(lost[..., :1])
    for element in lost.split(1, dim=-1):
        total = total + element
    while total.shape[-3] > 1:
        upper, lower = total.chunk(2, dim=-3)
        total = upper + lower
    return total
