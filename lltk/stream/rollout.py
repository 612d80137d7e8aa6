"""Chunk-by-chunk runs of a stream's graphs over their cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.stream.denoise import Velocity
from lltk.stream.pages import PageTable
from lltk.stream.positions import bounded_positions, frame_positions
from lltk.stream.runtimes import Runtime
from lltk.stream.runtimes.torch import TorchRuntime


class RuntimeRollout:
    """A runtime and its page table: each pass by itself, for any sampler."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._table = PageTable(runtime.geometry)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latents that passes and commits take."""
        return self._runtime.dtype

    @property
    def pages(self) -> dict[str, Tensor]:
        """The cache, by input name: [B, P, …] each."""
        return self._runtime.pages

    @property
    def table(self) -> PageTable:
        """Which chunks the cache holds."""
        return self._table

    def set_text(self, text: Tensor) -> None:
        """Encode a prompt, [B, S, E], for the chunks that follow."""
        self._runtime.set_prompt(text)

    def positions(self) -> Tensor:
        """The chunk in flight's, as `step` takes them, where cuts move none (φ = 0)."""
        pages, size = self._table.next_pages(), self._runtime.geometry.chunk
        if self._runtime.turns_pages:
            made = bounded_positions([0] * (len(pages.table) + 1), size)
        else:
            made = frame_positions([0], size, first=pages.chunk)
        return made.to(self._runtime.device)

    def step(self, latents: Tensor, timestep: Tensor, positions: Tensor, index: int = 0) -> Tensor:
        """One denoising pass of the chunk in flight.

        Args:
            latents: [B, C, F, h, w], noisy.
            timestep: float32 [B, F].
            positions: RoPE positions, as `Runtime.step` takes them.
            index: which of the chunk's passes it is.

        Returns:
            The model's output, [B, C, F, h, w].
        """
        return self._runtime.step(
            latents, timestep, positions, self._table.next_pages().table, index
        )

    def velocity(self, positions: Tensor) -> Velocity:
        """The model of the chunk in flight, for `denoise`; ``positions`` as `step`'s."""

        def velocity(latents: Tensor, timestep: Tensor, index: int) -> Tensor:
            return self.step(latents.to(self.dtype), timestep, positions, index)

        return velocity

    def commit(self, latents: Tensor, positions: Tensor, opens_shot: bool = False) -> None:
        """Write the finished chunk's K/V and move on to the next chunk."""
        pages = self._table.next_pages()
        self._runtime.commit(latents, positions, pages.table, pages.slot)
        self._table.commit(opens_shot)


class Rollout(RuntimeRollout):
    """The same over a Program, with gradients.

    Pages are constants, in commits and in passes alike. The gradients of earlier passes need the
    pages that these have read. So a commit to a page that was in use before copies the cache, and
    leaves the old one to them.

    Args:
        program: a causal stream Program (or later).
        module: the same Program, runnable.
        cuda_graphs: as `TorchRuntime`'s; then no gradients flow.
    """

    def __init__(self, program: Program, module: ProgramModule, cuda_graphs: bool = False) -> None:
        super().__init__(TorchRuntime(program, module, cuda_graphs))
        self._in_place = cuda_graphs
        self._used: set[int] = set()

    @torch.no_grad()
    def commit(self, latents: Tensor, positions: Tensor, opens_shot: bool = False) -> None:
        slot = self.table.next_pages().slot
        if not self._in_place:
            for name, page in self.pages.items():
                # Autograd takes any write to a tensor that it keeps for one to what it has read.
                # An alias of its own tells it that the written page is none that it has read.
                self.pages[name] = page.clone() if slot in self._used else page.data
        self._used.add(slot)
        super().commit(latents, positions, opens_shot)


class GraphedRollout(RuntimeRollout):
    """A rollout whose passes without gradients are CUDA graphs; so are its commits.

    Pages are constants. No page is written that a pass with gradients has read, so clips are no
    longer than the cache.

    Args:
        graphed: makes the passes without gradients. The cache is its own.
        eager: makes the others, over the same Program.
    """

    def __init__(self, graphed: TorchRuntime, eager: TorchRuntime) -> None:
        super().__init__(graphed)
        self._eager = eager
        for name, page in graphed.pages.items():
            eager.pages[name] = page.data

    def set_text(self, text: Tensor) -> None:
        with torch.no_grad():
            super().set_text(text)
        if torch.is_grad_enabled():
            self._eager.set_prompt(text)

    def step(self, latents: Tensor, timestep: Tensor, positions: Tensor, index: int = 0) -> Tensor:
        if not torch.is_grad_enabled():
            return super().step(latents, timestep, positions, index)
        return self._eager.step(latents, timestep, positions, self.table.next_pages().table, index)

    @torch.no_grad()
    def commit(self, latents: Tensor, positions: Tensor, opens_shot: bool = False) -> None:
        super().commit(latents, positions, opens_shot)
