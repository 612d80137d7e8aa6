"""Norm and SiLU behind cached frames: everything is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.cached_norm_silu.op import empty_results
from lltk.ops.cached_norm_silu.reference import EPS
from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(
    Exactness.ROUNDING, "sums in another order", devices=("cuda",), modules=("triton",), opaque=True
)

ELEMENTS = 4096
"""Elements that a program holds at once."""


def cached_norm_silu(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    cache: Tensor | None = None,
    keep: bool = False,
) -> list[Tensor]:
    """`reference.cached_norm_silu`, with sums taken in another order.

    Operands that do not lie in memory with channels last are copied first.
    """
    made = empty_results(x, gamma, bias, residual, cache, keep)
    batch, width, frames, height, columns = x.shape
    area = height * columns
    row = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // row)
    x = channels_last(x)
    with torch.cuda.device_of(x):
        _cached_norm_silu[(triton.cdiv(area, rows), 2 + frames, batch)](
            x,
            gamma.contiguous(),
            x if bias is None else bias.contiguous(),
            x if residual is None else channels_last(residual),
            x if cache is None else channels_last(cache),
            made[0],
            made[1],
            made[2] if keep else x,
            frames,
            area,
            int(cache is not None),
            width**0.5,
            EPS=EPS,
            WIDTH=width,
            ROW=row,
            ROWS=rows,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            KEEP=keep,
        )
    return made


def channels_last(x: Tensor) -> Tensor:
    """A clip whose channels lie last in memory."""
    return x.contiguous(memory_format=torch.channels_last_3d)


@triton.jit(do_not_specialize=["frames", "area", "cached"])
def _cached_norm_silu(
    x,
    gamma,
    bias,
    residual,
    cache,
    made,
    kept,
    total,
    frames,
    area,
    cached,
    root,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
):
    """A program makes some pixels of one frame of the result.

    Kernels are not compiled for each size of image, so that a decoder needs few of them.
    """
    frame, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, ROW)[None, :]
    inside = (row < area)[:, None] & (column < WIDTH)
    pixel = row.to(tl.int64)[:, None] * WIDTH + column
    size = area.to(tl.int64) * WIDTH
    if frame < 2:
        held = cache + (batch * 2 + frame) * size + pixel
        result = tl.load(held, mask=inside & (cached > 0), other=0.0)
    else:
        result = norm_silu(
            x,
            load_weights(gamma, column, WIDTH),
            bias,
            residual,
            total,
            (batch * frames + frame - 2) * size + pixel,
            inside,
            column,
            root,
            EPS,
            WIDTH,
            BIAS,
            RESIDUAL,
            KEEP,
        )
    tl.store(made + (batch * (frames + 2) + frame) * size + pixel, result, mask=inside)
    if frame >= frames:
        tl.store(kept + (batch * 2 + frame - frames) * size + pixel, result, mask=inside)


@triton.jit
def load_weights(weights, column, WIDTH: tl.constexpr):
    """float32 weights of a pixel's channels, 0 beyond ``WIDTH``."""
    return tl.load(weights + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def norm_silu(
    x,
    gamma,
    bias,
    residual,
    total,
    place,
    inside,
    column,
    root,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
):
    """The new pixels that lie at ``place``, in x's dtype; stores their sums if to KEEP."""
    kind = x.dtype.element_ty
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        values += load_weights(bias, column, WIDTH)
    if RESIDUAL:
        values += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    rounded = values.to(kind)
    if KEEP:
        tl.store(total + place, rounded, mask=inside)
    values = rounded.to(tl.float32)
    length = tl.sqrt(tl.sum(values * values, 1))
    length = tl.maximum(length, EPS, propagate_nan=tl.PropagateNan.ALL)
    values *= (root / length)[:, None]
    values *= gamma
    return (values / (1.0 + tl.exp(-values))).to(kind)
