"""Attention of a chunk over its own keys and committed pages in NVFP4."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lltk.ops.nvfp4_dequantise.reference import block_values
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.paged_attention.reference import attention, attention_backward


class Pages(NamedTuple):
    """An arena of keys or values in NVFP4.

    Attributes:
        codes: uint8 [B, P, T, H, D/2].
        scales: float8_e4m3fn [B, P, T, H, D/16].
        decode_scales: float32 [B, P, H].
        means: bfloat16 [B, P, H, D], added to what the codes give; or None.
    """

    codes: Tensor
    scales: Tensor
    decode_scales: Tensor
    means: Tensor | None


def empty_pages(shape: Sequence[int], smoothing: bool, device: torch.device | str = "cpu") -> Pages:
    """Arenas that nothing was written to, of keys or values [B, P, T, H, D], D whole blocks."""
    batch, count, tokens, heads, width = shape
    page, head = (batch, count, tokens, heads), (batch, count, heads)
    zeros = partial(torch.zeros, device=device)
    return Pages(
        zeros((*page, width // 2), dtype=torch.uint8),
        zeros((*page, width // BLOCK), dtype=torch.float8_e4m3fn),
        zeros(head, dtype=torch.float32),
        zeros((*head, width), dtype=torch.bfloat16) if smoothing else None,
    )


@torch.no_grad()
def decode(pages: Pages, table: Tensor) -> Tensor:
    """The listed pages' keys or values, constants: float32 [B, N * T, H, D]."""
    codes, scales, decode_scales = (part.index_select(1, table) for part in pages[:3])
    values = block_values(codes, scales) * decode_scales[:, :, None, :, None]
    if pages.means is not None:
        values = values + pages.means.index_select(1, table).unsqueeze(2)
    return values.flatten(1, 2)


def gather(own: Tensor, pages: Pages, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The listed pages, decoded, then the chunk's own: [B, N * T + L, H, D] in ``dtype``."""
    return torch.cat([decode(pages, table).to(dtype), own.to(dtype)], dim=1)


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
    """Attend to the chunk's own keys, as they are, and to the decoded pages that ``table`` lists.

    Args:
        q, k, v: [B, L, H, D], this chunk's.
        k_codes, k_scales, k_decode_scales, k_means: the keys' `Pages`; they carry their positions.
        v_codes, v_scales, v_decode_scales, v_means: the values' `Pages`.
        table: int64 [N], distinct committed pages; their order does not matter, N may be 0.

    Returns:
        [B, L, H, D] in ``q``'s dtype.
    """
    keys = _wide(k, Pages(k_codes, k_scales, k_decode_scales, k_means), table)
    values = _wide(v, Pages(v_codes, v_scales, v_decode_scales, v_means), table)
    return attention(q, keys, values)


def nvfp4_paged_attention_backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v; committed pages are constants."""
    keys = _wide(k, Pages(k_codes, k_scales, k_decode_scales, k_means), table)
    values = _wide(v, Pages(v_codes, v_scales, v_decode_scales, v_means), table)
    dq, dk, dv = attention_backward(grad, q, keys, values)
    own = k.shape[1]
    return dq, dk[:, -own:].to(k.dtype).contiguous(), dv[:, -own:].to(v.dtype).contiguous()


def _wide(own: Tensor, pages: Pages, table: Tensor) -> Tensor:
    """In float32 or wider, so that decoding is not rounded."""
    return gather(own, pages, table, torch.promote_types(own.dtype, torch.float32))
