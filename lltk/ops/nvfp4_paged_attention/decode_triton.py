"""Attention over pages that a kernel decodes to where attention reads them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lltk.ops.declaration import ARITHMETIC, E2M1, Declaration, Exactness
from lltk.ops.nvfp4_paged_attention.triton import block_values, check_width
from lltk.ops.paged_attention.sdpa import attend

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "decodes pages by a kernel, then torch's attention",
    devices=("cuda",),
    modules=("triton",),
    architectures=(*ARITHMETIC, *E2M1),
)


def nvfp4_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    k_decode_scales: Tensor,
    k_means: Tensor | None,
    v_codes: Tensor,
    v_scales: Tensor,
    v_decode_scales: Tensor,
    v_means: Tensor | None,
    table: Tensor,
) -> Tensor:
    """`decode.nvfp4_paged_attention`, but a kernel decodes the pages.

    Raises:
        ValueError: D is no power of two.
    """
    check_width(q)
    keys = gather(k, k_codes, k_scales, k_decode_scales, k_means, table)
    values = gather(v, v_codes, v_scales, v_decode_scales, v_means, table)
    return attend(q, keys, values)


@torch.library.custom_op("lltk::nvfp4_gather_triton", mutates_args=())
def gather(
    own: Tensor,
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    table: Tensor,
) -> Tensor:
    """The listed pages, decoded constants, then the chunk's own: [B, N * T + L, H, D]."""
    batch, _, heads, width = own.shape
    tokens, listed = codes.shape[2], table.shape[0]
    out = _new_gathered(own, codes, scales, decode_scales, means, table)
    out[:, listed * tokens :] = own
    tile = 4096 // width
    if listed:
        with torch.cuda.device_of(own):
            decode_kernel[(triton.cdiv(tokens * heads, tile), listed, batch)](
                out, codes, scales.view(torch.uint8), decode_scales, means, table,
                codes.shape[1], tokens * heads, heads, out.stride(0),
                WIDTH=width, ROWS=tile, MEANS=means is not None, enable_fp_fusion=False,
            )  # fmt: skip
    return out


@gather.register_fake
def _new_gathered(
    own: Tensor,
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    table: Tensor,
) -> Tensor:
    batch, length, *head = own.shape
    return own.new_empty((batch, table.shape[0] * codes.shape[2] + length, *head))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.own = inputs[0].shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad[:, -ctx.own :].contiguous(), *[None] * 5)


gather.register_autograd(_backward, setup_context=_save)


@triton.jit
def decode_kernel(
    out_ptr, codes, scales, decode_scales, means, table,
    pages, rows, heads, out_batch,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one listed page, decoded to their place among the listed."""
    index, batch = tl.program_id(1), tl.program_id(2)
    page = batch.to(tl.int64) * pages + tl.load(table + index)
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    held = row < rows
    values = block_values(
        codes + page * rows * (WIDTH // 2), scales + page * rows * (WIDTH // 16),
        row, held, WIDTH, ROWS,
    ).to(tl.float32)  # fmt: skip
    head = page * heads + row % heads
    values *= (tl.load(decode_scales + head, mask=held, other=0.0) * 16384.0)[:, None]
    if MEANS:
        places = head[:, None] * WIDTH + channel[None, :]
        values += tl.load(means + places, mask=held[:, None], other=0.0).to(tl.float32)
    places = batch.to(tl.int64) * out_batch + (index.to(tl.int64) * rows + row[:, None]) * WIDTH
    result = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places + channel[None, :], result, mask=held[:, None])
