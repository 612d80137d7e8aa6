"""What every runtime does with its pages: hold, check, give and take over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lltk.graph.contract import Role, TensorSpec, saved_pages
from lltk.graph.geometry import Geometry
from lltk.graph.packed import broken_scales
from lltk.graph.spec import ModelSpec
from lltk.stream.lanes import Lane


class PagedRuntime:
    """The part of a `lltk.stream.runtimes.Runtime` that does not depend on what runs the graphs.

    Args:
        geometry: the sizes it is made for.
        spec: the transformer's.
        dtype: of the latents it takes and of the samples it gives.
        lane: where the calls take turns, and so where its tensors are.
        pages: the cache's, by input name.
    """

    def __init__(
        self,
        geometry: Geometry,
        spec: ModelSpec,
        dtype: torch.dtype,
        lane: Lane,
        pages: Mapping[str, TensorSpec],
    ) -> None:
        self._geometry, self._spec, self._dtype, self._lane = geometry, spec, dtype, lane
        self._saved = saved_pages(pages)
        self._pages = zeros(pages, lane.device)
        self._telling = _telling(self._pages, pages)

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._lane.device

    @property
    def lane(self) -> Lane:
        return self._lane

    @property
    def turns_pages(self) -> bool:
        return False

    @property
    def pages(self) -> dict[str, Tensor]:
        return self._pages

    def clear(self) -> None:
        for page in self._pages.values():
            page.zero_()

    def magnitudes(self, slot: int) -> Tensor:
        check_indices((slot,), self._geometry.pages)
        return torch.stack([largest(page[:, slot]) for page in self._telling.values()])

    @property
    def _held(self) -> dict[str, Tensor]:
        """The pages that a state holds; not copies."""
        return {name: self._pages[name] for name in self._saved}

    def state(self) -> dict[str, Tensor]:
        _check_pages(self._held, self._saved)
        return self._held

    def restore(self, state: Mapping[str, Tensor]) -> None:
        wanted, found = (
            {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
            for tensors in (self._held, state)
        )
        if found != wanted:
            raise ValueError(
                f"state: its pages {found} are not this program's, {wanted}; restore a state of "
                "the same model and geometry"
            )
        _check_pages(state, self._saved)
        for name, page in self._held.items():
            page.copy_(state[name])


def zeros(specs: Mapping[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Tensors of zeros, by name."""
    return {n: torch.zeros(s.shape, dtype=s.dtype, device=device) for n, s in specs.items()}


def largest(values: Tensor) -> Tensor:
    """The largest magnitude, []; NaN if a value is NaN. Reads the values once and copies none."""
    return torch.linalg.vector_norm(values, torch.inf)


def _telling(pages: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> Mapping[str, Tensor]:
    """The parts of a cache that tell whether a page is finite.

    A decode scale is NaN where the keys or values that it was computed from are not finite.
    """
    scales = {n: page for n, page in pages.items() if specs[n].role is Role.PAGE_DECODE_SCALES}
    return scales or pages


def _check_pages(pages: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
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
