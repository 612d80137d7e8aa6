"""Decoding pages to E4M3 as a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.nvfp4_gather_fp8.op import new_gathered
from lltk.ops.nvfp4_paged_attention.triton import block_values
from lltk.ops.triton_floats import magnitude_bits

DECLARATION = Declaration(
    Exactness.BITWISE,
    "a tile of a page a program",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
    opaque=True,
)


def nvfp4_gather_fp8(
    own: Tensor,
    centre: Tensor,
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.nvfp4_gather_fp8`."""
    batch, length, heads, width = own.shape
    tokens, listed = codes.shape[2], table.shape[0]
    out, _ = new_gathered(own, centre, codes, scales, decode_scales, means, table)
    tile = 4096 // width
    grid = (triton.cdiv(max(tokens, length), tile), listed + 1, batch * heads)
    peaks = torch.empty(grid, device=own.device)
    own = own if own.stride(-1) == 1 else own.contiguous()
    with torch.cuda.device_of(own):
        decode_fp8_kernel[grid](
            out, peaks.view(torch.int32), own, centre.contiguous(),
            codes, scales.view(torch.uint8), decode_scales, means, table,
            codes.shape[1], tokens, length, heads, *own.stride()[:3],
            WIDTH=width, ROWS=tile, MEANS=means is not None, enable_fp_fusion=False,
        )  # fmt: skip
    return out, peaks.amax()


@triton.jit
def decode_fp8_kernel(
    out_ptr, peaks, own, centre, codes, scales, decode_scales, means, table,
    pages, tokens, owned, heads, own_batch, own_token, own_head,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Subtract a centre from one head of ROWS tokens, and round to E4M3.

    The tokens are those of a listed page or, behind the last page, the chunk's own. Each program
    keeps the bits of its largest magnitude.
    """
    index, listed = tl.program_id(1), tl.num_programs(1) - 1
    batch, head = (tl.program_id(2) // heads).to(tl.int64), tl.program_id(2) % heads
    token, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    held = token < tl.where(index < listed, tokens, owned)
    if index < listed:
        page = batch * pages + tl.load(table + index)
        first = page * tokens * heads + head
        values = block_values(
            codes + first * (WIDTH // 2), scales + first * (WIDTH // 16),
            token * heads, held, WIDTH, ROWS,
        ).to(tl.float32)  # fmt: skip
        values *= tl.load(decode_scales + page * heads + head) * 16384.0
        if MEANS:
            mean = tl.load(means + (page * heads + head) * WIDTH + channel)
            values += mean.to(tl.float32)[None, :]
    else:
        places = batch * own_batch + head * own_head + token[:, None].to(tl.int64) * own_token
        values = tl.load(own + places + channel[None, :], mask=held[:, None], other=0.0)
        values = values.to(tl.float32)
    values -= tl.load(centre + (batch * heads + head) * WIDTH + channel)[None, :]
    bits = tl.where(held[:, None], magnitude_bits(values), 0)
    program = (tl.program_id(2) * (listed + 1) + index) * tl.num_programs(0) + tl.program_id(0)
    tl.store(peaks + program, tl.max(tl.max(bits, 1), 0))
    row = batch * (listed * tokens + owned) + index.to(tl.int64) * tokens + token[:, None]
    values = tl.clamp(values, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    places = (row * heads + head) * WIDTH + channel[None, :]
    tl.store(out_ptr + places, values.to(out_ptr.dtype.element_ty), mask=held[:, None])
