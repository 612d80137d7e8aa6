"""What runs a video's graphs: a protocol, and a file for each implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lltk.graph.geometry import Geometry
from lltk.graph.spec import ModelSpec
from lltk.stream.lanes import Lane


class Runtime(Protocol):
    """Runs prologue, step and commit of one video over buffers that it owns, at fixed addresses.

    It knows pages, but not which chunk a page holds: that is the caller's. It asserts that the
    pages of a call are different ones of its cache. Only `state`, `restore` and what looks for a
    bad value wait for the device.
    """

    @property
    def geometry(self) -> Geometry:
        """The sizes it is made for."""

    @property
    def spec(self) -> ModelSpec:
        """The transformer's names and sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latents it takes and of the samples it gives."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    @property
    def lane(self) -> Lane:
        """Where runtimes over the same weights take turns: a chunk is made within one turn."""

    @property
    def turns_pages(self) -> bool:
        """Whether pages hold keys before RoPE, so that calls take the pages' positions too."""

    @property
    def pages(self) -> dict[str, Tensor]:
        """The cache, by input name: [B, P, …] each; not copies."""

    def clear(self) -> None:
        """Make the pages as they were before the first commit, for another video."""

    def set_prompt(self, text: Tensor) -> None:
        """Take a prompt, [B, S, E], for the calls that follow."""

    def step(
        self,
        latents: Tensor,
        timestep: Tensor,
        positions: Tensor,
        table: Sequence[int],
        index: int = 0,
    ) -> Tensor:
        """One denoising pass of the chunk in flight.

        Args:
            latents: [B, C, F, h, w], noisy.
            timestep: float32 [B, F].
            positions: float64 [F], the frames' RoPE positions. With `turns_pages` [N * F + F]:
                those of the listed pages' frames, in the table's order, and then the chunk's.
            table: N committed pages to attend to.
            index: which of the chunk's passes it is. A Program may run some in high precision.

        Returns:
            The model's output, [B, C, F, h, w].
        """

    def first_bad(
        self,
        latents: Tensor,
        timestep: Tensor,
        positions: Tensor,
        table: Sequence[int],
        index: int = 0,
    ) -> str | None:
        """Find the first value of a `step` that is not finite: where it is, or None."""

    def commit(self, latents: Tensor, positions: Tensor, table: Sequence[int], slot: int) -> None:
        """Write a clean chunk's K/V to page ``slot``; the rest as `step`'s."""

    def magnitudes(self, slot: int) -> Tensor:
        """Magnitudes that tell whether page ``slot`` is finite.

        Returns:
            [n] of the pages' dtype or float32, the same on every rank: the page's largest magnitude
            in each input of the cache that tells, of all ranks.
        """

    def first_bad_commit(
        self,
        latents: Tensor,
        positions: Tensor,
        table: Sequence[int],
        slot: int,
        magnitudes: Tensor,
    ) -> str:
        """Find the first value of a `commit` that is not finite, by making the commit again.

        Args:
            latents, positions, table, slot: the commit's.
            magnitudes: the page's after it, not all of them finite.

        Returns:
            A node of its graph; or the page's name, if all nodes of this rank are finite.
        """

    def state(self) -> dict[str, Tensor]:
        """The pages, by name, without what follows from others; not copies.

        Raises:
            ValueError: a page is not finite, or has scales that are NaN or negative.
        """

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over pages that `state` gave, and make what follows from them, bit for bit.

        Raises:
            ValueError: other names, shapes or dtypes, or what `state` refuses.
        """
