"""A folded upsampling's phases interleaved and its shortcut added, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.upsample_residual.op import empty_result

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "sum and product may be rounded at once",
    devices=("cuda",),
    modules=("triton",),
    opaque=True,
)

_ELEMENTS = 4096
"""Elements that a program makes."""


def upsample_residual(phases: Tensor, bias: Tensor, shortcut: Tensor, stride: int) -> Tensor:
    """See `reference.upsample_residual`.

    Operands that do not lie in memory with channels last are copied first.
    """
    made = empty_result(phases, bias, shortcut, stride)
    (_, width, given, height, columns), channels = shortcut.shape, bias.numel()
    row = triton.next_power_of_2(channels)
    rows = max(1, _ELEMENTS // row)
    with torch.cuda.device_of(phases):
        _upsample_residual[(triton.cdiv(4 * height * columns, rows), phases.shape[0])](
            phases.contiguous(memory_format=torch.channels_last),
            bias.contiguous(),
            shortcut.contiguous(memory_format=torch.channels_last_3d),
            made,
            made.shape[2],
            given,
            height,
            columns,
            WIDTH=channels,
            SHORTCUT=width,
            STRIDE=stride,
            ROW=row,
            ROWS=rows,
        )
    return made


@triton.jit(do_not_specialize=["frames", "given", "height", "columns"])
def _upsample_residual(
    phases,
    bias,
    shortcut,
    made,
    frames,
    given,
    height,
    columns,
    WIDTH: tl.constexpr,
    SHORTCUT: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program makes some pixels of one frame of the result."""
    repeats: tl.constexpr = 4 * WIDTH * STRIDE // SHORTCUT
    image = tl.program_id(1)
    batch, frame = image // frames, image % frames + given * STRIDE - frames
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y, x = pixel // (2 * columns), pixel % (2 * columns)
    i, j, a, b = y // 2, x // 2, y % 2, x % 2
    column = tl.arange(0, ROW)[None, :]
    inside = (pixel < 4 * height * columns)[:, None] & (column < WIDTH)
    phase = (2 * a + b)[:, None]
    spot = (image * (height + 1) + i + a).to(tl.int64) * (columns + 1) + j + b
    values = tl.load(
        phases + spot[:, None] * (4 * WIDTH) + phase * WIDTH + column, mask=inside, other=0.0
    ).to(tl.float32)
    values += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    spot = ((batch * given + frame // STRIDE) * height + i).to(tl.int64) * columns + j
    source = shortcut + spot[:, None] * SHORTCUT
    if repeats == 4 * STRIDE:
        near = tl.load(source + column, mask=inside, other=0.0)
    elif repeats == 2 and STRIDE == 1:  # one channel for each row of the result
        pair = tl.arange(0, 2 * ROW)[None, :]
        within = (pixel < 4 * height * columns)[:, None] & (pair < SHORTCUT)
        pairs = tl.reshape(tl.load(source + pair, mask=within, other=0.0), (ROWS, ROW, 2))
        even, odd = tl.split(pairs)
        near = tl.where((a == 1)[:, None], odd, even)
    else:
        channel = (4 * (column * STRIDE + frame % STRIDE) + phase) // repeats
        near = tl.load(source + channel, mask=inside, other=0.0)
    values += near.to(tl.float32)
    place = (image.to(tl.int64) * (4 * height * columns) + pixel)[:, None] * WIDTH + column
    tl.store(made + place, values.to(made.dtype.element_ty), mask=inside)
