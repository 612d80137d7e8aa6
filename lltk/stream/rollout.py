"""Chunk-by-chunk runs of a stream's graphs over their cache."""

from __future__ import annotations

from torch import Tensor

from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.stream.denoise import Velocity
from lltk.stream.pages import PageTable
from lltk.stream.runtimes import Runtime
from lltk.stream.runtimes.torch import TorchRuntime


class RuntimeRollout:
    """A runtime and its page table: each pass by itself, for any sampler."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._table = PageTable(runtime.geometry)

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

    def step(self, latents: Tensor, timestep: Tensor, positions: Tensor, index: int = 0) -> Tensor:
        """One denoising pass of the chunk in flight.

        Args:
            latents: [B, C, F, h, w], noisy.
            timestep: float32 [B, F].
            positions: float64 [F], the frames' RoPE positions.
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
            return self.step(latents.to(self._runtime.dtype), timestep, positions, index)

        return velocity

    def commit(self, latents: Tensor, positions: Tensor, opens_shot: bool = False) -> None:
        """Write the finished chunk's K/V and move on to the next chunk."""
        pages = self._table.next_pages()
        self._runtime.commit(latents, positions, pages.table, pages.slot)
        self._table.commit(opens_shot)


class Rollout(RuntimeRollout):
    """The same over a Program, with gradients.

    Args:
        program: a causal stream Program (or later).
        module: the same Program, runnable.
        cuda_graphs: as `TorchRuntime`'s; then no gradients flow.
    """

    def __init__(self, program: Program, module: ProgramModule, cuda_graphs: bool = False) -> None:
        super().__init__(TorchRuntime(program, module, cuda_graphs))
