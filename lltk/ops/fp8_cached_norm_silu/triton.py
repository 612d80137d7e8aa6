"""Norm and SiLU behind cached frames, in E4M3: everything is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.cached_norm_silu.reference import EPS
from lltk.ops.cached_norm_silu.triton import ELEMENTS, channels_last, load_weights, norm_silu
from lltk.ops.declaration import E4M3, Declaration, Exactness
from lltk.ops.floats import E4M3_MAX
from lltk.ops.fp8_cached_norm_silu.op import empty_results
from lltk.ops.triton_floats import reciprocal
from lltk.ops.triton_rows import converts_e4m3, e4m3_codes

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "sums in another order",
    devices=("cuda",),
    modules=("triton",),
    architectures=E4M3,
    opaque=True,
)


def fp8_cached_norm_silu(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    cache: Tensor | None = None,
    keep: bool = False,
) -> list[Tensor]:
    """`reference.fp8_cached_norm_silu`, with sums taken in another order.

    Operands that do not lie in memory with channels last are copied first.
    """
    made = empty_results(x, gamma, bias, residual, cache, keep)
    frames, kept = (part.view(torch.uint8) for part in made[:2])
    batch, width, count, height, columns = x.shape
    row = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // row)
    x = channels_last(x)
    with torch.cuda.device_of(x):
        _fp8_cached_norm_silu[(triton.cdiv((height + 2) * (columns + 2), rows), 2 + count, batch)](
            x,
            gamma.contiguous(),
            x if bias is None else bias.contiguous(),
            x if residual is None else channels_last(residual),
            kept if cache is None else channels_last(cache.view(torch.uint8)),
            frames,
            kept,
            made[2],
            made[3] if keep else x,
            count,
            height,
            columns,
            int(cache is not None),
            width**0.5,
            width**0.5 / E4M3_MAX,
            EPS=EPS,
            WIDTH=width,
            ROW=row,
            ROWS=rows,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            KEEP=keep,
            NATIVE=converts_e4m3(x.device),
        )
    return made


@triton.jit(do_not_specialize=["frames", "height", "columns", "cached"])
def _fp8_cached_norm_silu(
    x,
    gamma,
    bias,
    residual,
    cache,
    made,
    kept,
    scale,
    total,
    frames,
    height,
    columns,
    cached,
    root,
    most,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """A program makes some pixels of one frame of the result, the zeros around the image too."""
    frame, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    spot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, ROW)[None, :]
    down, across = spot // (columns + 2) - 1, spot % (columns + 2) - 1
    image = (down >= 0) & (down < height) & (across >= 0) & (across < columns)
    inside = image[:, None] & (column < WIDTH)
    pixel = (down * columns + across).to(tl.int64)[:, None] * WIDTH + column
    size = (height * columns).to(tl.int64) * WIDTH
    if frame < 2:
        held = cache + (batch * 2 + frame) * size + pixel
        codes = tl.load(held, mask=inside & (cached > 0), other=0)
    else:
        weights = load_weights(gamma, column, WIDTH)
        peak = tl.max(tl.abs(weights)) * most
        peak = tl.where(peak == 0.0, 1.0, peak)
        if (frame == 2) & (tl.program_id(0) == 0) & (batch == 0):
            tl.store(scale, peak)
        result = norm_silu(
            x,
            weights,
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
        codes = e4m3_codes(result.to(tl.float32) * reciprocal(peak), NATIVE)
        codes = tl.where(inside, codes, 0)
    padded = (height + 2) * (columns + 2)
    place = (batch * (frames + 2) + frame) * padded + spot
    written = (spot < padded)[:, None] & (column < WIDTH)
    tl.store(made + place[:, None] * WIDTH + column, codes, mask=written)
    if frame >= frames:
        tl.store(kept + (batch * 2 + frame - frames) * size + pixel, codes, mask=inside)
