"""Paged attention that reads the arena itself, not a copy of its pages; without gradients.

If the table lists all pages but one, and their dtype is the chunk's, the chunk's keys and values
are first written to the page that is left. Its commit will write that page again. Otherwise pages
are copied.
"""

from __future__ import annotations

from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.paged_attention import sdpa
from lltk.ops.write_page.reference import write_page

DECLARATION = Declaration(
    Exactness.ROUNDING, "torch's attention; reads pages where they lie and copies none"
)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor
) -> Tensor:
    """`reference.paged_attention`, by the backend torch picks for the device."""
    pages = k_pages.shape[1]
    if table.shape[0] + 1 != pages or k.dtype != k_pages.dtype:
        return sdpa.paged_attention(q, k, v, k_pages, v_pages, table)
    free = pages * (pages - 1) // 2 - table.sum().view(1)
    write_page(k_pages, k, free)
    write_page(v_pages, v, free)
    return sdpa.attend(q, k_pages.flatten(1, 2), v_pages.flatten(1, 2))
