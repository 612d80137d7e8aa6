"""What runtimes check of the pages that they write, give and take over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lltk.graph.contract import Role, TensorSpec
from lltk.graph.packed import broken_scales


def largest(values: Tensor) -> Tensor:
    """The largest magnitude, []; NaN if a value is NaN. Reads the values once and copies none."""
    return torch.linalg.vector_norm(values, torch.inf)


def telling(pages: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> Mapping[str, Tensor]:
    """The parts of a cache that tell whether a page is finite.

    A decode scale is NaN where the keys or values that it was computed from are not finite.
    """
    scales = {n: page for n, page in pages.items() if specs[n].role is Role.PAGE_DECODE_SCALES}
    return scales or pages


def restore_pages(
    pages: Mapping[str, Tensor], state: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]
) -> None:
    """Copy pages that a state holds to where a runtime has them.

    Raises:
        ValueError: other names, shapes or dtypes, or what `check_pages` refuses.
    """
    wanted, found = (
        {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        for tensors in (pages, state)
    )
    if found != wanted:
        raise ValueError(
            f"state: its pages {found} are not this program's, {wanted}; restore a state of "
            "the same model and geometry"
        )
    check_pages(state, specs)
    for name, page in pages.items():
        page.copy_(state[name])


def check_pages(pages: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Refuse pages with values that no commit writes; waits for the device.

    Raises:
        ValueError: a value is not finite, or a scale is NaN or negative.
    """
    for name, page in pages.items():
        if wrong := _wrong(page, specs[name].role):
            raise ValueError(
                f"state: {name} has {wrong}; what wrote it is broken, or the file is damaged: "
                "resume from another"
            )


def _wrong(page: Tensor, role: Role | None) -> str | None:
    if page.dtype is torch.float8_e4m3fn:
        return "block scales that are NaN or negative" if broken_scales(page) else None
    if not page.is_floating_point():
        return None
    if not largest(page).isfinite():
        return "values that are not finite"
    negative = role is Role.PAGE_DECODE_SCALES and bool((page < 0).any())
    return "decode scales that are negative" if negative else None


def check_indices(pages: Sequence[int], count: int) -> None:
    """Check that pages are there, and none twice; kernels read and write where these say."""
    assert all(0 <= page < count for page in pages) and len(set(pages)) == len(pages), (
        f"pages {list(pages)} are not different ones of {count}"
    )
