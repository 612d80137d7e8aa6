"""A page in NVFP4, decoded to E4M3 and kept."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.implementations import overload
from lltk.ops.nvfp4_paged_attention.fp8 import Kernel


def with_gather(nvfp4_gather_fp8: Kernel) -> Kernel:
    """The op by an implementation of `nvfp4_gather_fp8`."""

    def fp8_decode_page(
        decoded: Tensor,
        largest: Tensor,
        codes: Tensor,
        scales: Tensor,
        decode_scales: Tensor,
        means: Tensor,
        slot: Tensor,
    ) -> None:
        """Decode a page, subtract the means of page 0, and round it to E4M3.

        What `lltk.ops.nvfp4_gather_fp8.reference` says of a page holds of it, bit for bit, as long
        as page 0 is the first that is listed.

        Args:
            decoded: float8_e4m3fn [B, P, T, H, D]; the page is written in place.
            largest: float32 [B, P]; the largest magnitude in the page before it was rounded is
                written in place.
            codes, scales, decode_scales, means: the arena, as
                `lltk.ops.nvfp4_paged_attention.reference.Pages`.
            slot: int64 [1].
        """
        own = means.new_empty((means.shape[0], 0, *means.shape[2:]))
        values, most = nvfp4_gather_fp8(
            own, means[:, :1].float(), codes, scales, decode_scales, means, slot
        )
        # Eight bytes an element: a GPU copies few wide elements faster than many narrow ones.
        decoded.view(torch.int64).index_copy_(1, slot, values.view(torch.int64).unsqueeze(1))
        largest.index_copy_(1, slot, most.expand(largest.shape[0], 1))

    return fp8_decode_page


fp8_decode_page = with_gather(lambda *given: overload("nvfp4_gather_fp8")(*given))
