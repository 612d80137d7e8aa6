"""What runs a video's graphs: one protocol, an implementation a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lltk.graph.geometry import Geometry
from lltk.graph.spec import ModelSpec
from lltk.stream.lanes import Lane


class Runtime(Protocol):
    """Prologue, step and commit of one video, over buffers it owns at fixed addresses.

    It knows pages, not chunks: which page holds what is the caller's. Only `state`, `restore` and
    what looks for a bad value wait for the device.
    """

    @property
    def geometry(self) -> Geometry:
        """Sizes it is made for."""

    @property
    def spec(self) -> ModelSpec:
        """The transformer's names and sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents it takes and the samples it gives."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    @property
    def lane(self) -> Lane:
        """Where runtimes over the same weights take turns: a chunk is made within one turn."""

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
            positions: float64 [F], the frames' RoPE positions.
            table: committed pages to attend to.
            index: which of the chunk's passes it is; a Program may choose a precision by it.

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
        """Where the first value of a `step` that is not finite is, or None."""

    def commit(self, latents: Tensor, positions: Tensor, table: Sequence[int], slot: int) -> None:
        """Write a clean chunk's K/V to page ``slot``; the rest as `step`'s."""

    def magnitudes(self, slot: int) -> Tensor:
        """Of all that page ``slot`` holds, those that tell whether it is finite, of every rank.

        Returns:
            Of the pages' dtype or float32, [n], the same on every rank; not finite where the page
            is not.
        """

    def first_bad_commit(
        self,
        latents: Tensor,
        positions: Tensor,
        table: Sequence[int],
        slot: int,
        magnitudes: Tensor,
    ) -> str:
        """Where the first value of a `commit` that is not finite is; makes the commit again.

        Args:
            latents, positions, table, slot: the commit's.
            magnitudes: the page's after it, not all of them finite.

        Returns:
            A node of its graph; the page's name, where all nodes of this rank are finite.
        """

    def state(self) -> dict[str, Tensor]:
        """The pages, by name; not copies.

        Raises:
            ValueError: a page is not finite, or has scales that are NaN or negative.
        """

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over pages that `state` gave.

        Raises:
            ValueError: other names, shapes or dtypes, or what `state` refuses.
        """
