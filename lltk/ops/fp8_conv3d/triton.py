"""A convolution of FP8 operands by tensor cores, without unfolding its input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_conv3d.op import empty_result
from lltk.ops.fp8_conv3d.reference import TAPS

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "summed as tensor cores do, with about 14 bits",
    devices=("cuda",),
    modules=("triton",),
    architectures=((9, 0), (10, 0), (10, 3)),
    opaque=True,
)

_PIXELS = 128
"""Pixels of a tile."""
_CHANNELS = 256
"""Channels of a tile of results, at most."""
_DEPTH = 128
"""Channels of the input that a step multiplies, at most. Tensor cores take 32 at once."""
_GROUP = 16
"""How many tiles of pixels read the same weights one after another."""


def fp8_conv3d(
    frames: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.fp8_conv3d`, summed as tensor cores sum FP8 products, with about 14 bits.

    Raises:
        ValueError: C is not a multiple of 16.
    """
    out = empty_result(frames, scale, weight, weight_scales, bias, dtype)
    batch, width, count, height, columns = frames.shape
    if width % 16:
        raise ValueError(
            f"fp8_conv3d: triton is for multiples of 16 channels, not for {width}; set fp8_conv3d "
            "of the decoder's lower pass to reference"
        )
    frames = frames.contiguous(memory_format=torch.channels_last_3d)
    pixels = frames.permute(0, 2, 3, 4, 1).view(-1, width)
    wide = weight.shape[0]
    tile = min(max(triton.next_power_of_2(wide), 16), _CHANNELS)
    depth = min(max(triton.next_power_of_2(width), 32), _DEPTH)
    spots = triton.cdiv((height - 2) * columns, _PIXELS) * batch * (count - 2)
    with torch.cuda.device_of(frames):
        _fp8_conv3d[(spots * triton.cdiv(wide, tile),)](
            TensorDescriptor.from_tensor(pixels, [_PIXELS, depth]),
            TensorDescriptor.from_tensor(weight.contiguous(), [tile, depth]),
            out,
            scale,
            weight_scales,
            out if bias is None else bias,
            batch,
            count,
            height,
            columns,
            wide,
            WIDTH=width,
            TAPS=TAPS,
            PIXELS=_PIXELS,
            TILE=tile,
            DEPTH=depth,
            GROUP=_GROUP,
            BIAS=bias is not None,
            num_warps=8 if tile == _CHANNELS else 4,
            num_stages=4,
        )
    return out


@triton.jit(do_not_specialize=["batch", "count", "height", "columns"])
def _fp8_conv3d(
    frames,
    weight,
    out,
    scale,
    weight_scales,
    bias,
    batch,
    count,
    height,
    columns,
    wide,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
):
    """TILE channels of PIXELS of a result, whose rows are as long as the input's.

    So the pixels that a tap reads are as far from the tile's own wherever the tile lies. The last
    two pixels of each row are computed but not kept. Tiles are of one dimension because Triton
    (3.6, 3.7) gives an operand that is reshaped after it was loaded one buffer too few.
    """
    image = (height - 2) * columns
    parts, tiles = tl.cdiv(image, PIXELS), tl.cdiv(wide, TILE)
    spots = parts * batch * (count - 2)
    group = tl.program_id(0) // (GROUP * tiles)
    within = tl.program_id(0) % (GROUP * tiles)
    together = tl.minimum(spots - group * GROUP, GROUP)
    spot = group * GROUP + within % together
    channel = within // together * TILE
    which = spot // parts
    first = spot % parts * PIXELS
    start = (which + which // (count - 2) * 2) * height * columns + first
    steps: tl.constexpr = (WIDTH + DEPTH - 1) // DEPTH
    acc = tl.zeros((PIXELS, TILE), tl.float32)
    for step in range(TAPS * steps):
        tap, depth = step // steps, step % steps * DEPTH
        away = (tap // 9 * height + tap // 3 % 3) * columns + tap % 3
        values = frames.load([start + away, depth])
        taps = weight.load([channel, tap * WIDTH + depth])
        acc = tl.dot(values, taps.T, acc)
    pixel = first + tl.arange(0, PIXELS)
    row, column = pixel // columns, pixel % columns
    made = channel + tl.arange(0, TILE)
    held = (row < height - 2) & (column < columns - 2)
    scales = tl.load(weight_scales + made, mask=made < wide, other=0.0) * tl.load(scale)
    acc *= scales[None, :]
    if BIAS:
        acc += tl.load(bias + made, mask=made < wide, other=0.0).to(tl.float32)[None, :]
    place = (which * (height - 2) + row).to(tl.int64) * (columns - 2) + column
    tl.store(
        out + place[:, None] * wide + made[None, :],
        acc.to(out.dtype.element_ty),
        mask=held[:, None] & (made < wide)[None, :],
    )
