"""Chunk-by-chunk runs of a stream Program over its cache."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.stream.pages import PageTable


class Rollout:
    """Runs prologue, step and commit over pages it owns.

    Args:
        program: a causal stream Program (or later).
        module: the same Program, runnable.
    """

    def __init__(self, program: Program, module: ProgramModule) -> None:
        self._module = module
        self._table = PageTable(program.geometry)
        self._commit_inputs = program.contract("commit").inputs.keys()
        self._step_inputs = program.contract("step").inputs.keys()
        parameter = next(module.parameters())
        self._device = parameter.device
        self._pages = {
            name: torch.zeros(spec.shape, dtype=spec.dtype, device=self._device)
            for name, spec in program.contract("commit").inputs.items()
            if name.startswith(("k_pages_", "v_pages_"))
        }
        self._text: dict[str, Tensor] = {}

    @property
    def pages(self) -> dict[str, Tensor]:
        """The cache, by input name: [B, P, T, H, D] each."""
        return self._pages

    @property
    def table(self) -> PageTable:
        """Which chunks the cache holds."""
        return self._table

    def set_text(self, text: Tensor) -> None:
        """Encode a prompt, [B, S, E], for the chunks that follow."""
        self._text = self._module("prologue", encoder_hidden_states=text)

    def step(self, latents: Tensor, timestep: Tensor, positions: Tensor) -> Tensor:
        """One denoising pass of the chunk in flight.

        Args:
            latents: [B, C, F, h, w], noisy.
            timestep: float32 [B, F].
            positions: float64 [F], the frames' RoPE positions.

        Returns:
            The model's output, [B, C, F, h, w].
        """
        inputs = {"hidden_states": latents, "timestep": timestep, "positions": positions}
        result = self._module("step", **self._with_cache(inputs, self._step_inputs))
        return result["sample"]

    def commit(self, latents: Tensor, positions: Tensor, opens_shot: bool = False) -> None:
        """Write the finished chunk's K/V and move on to the next chunk."""
        inputs = {"hidden_states": latents, "positions": positions}
        inputs["slot"] = torch.tensor([self._table.plan().slot], device=self._device)
        self._module("commit", **self._with_cache(inputs, self._commit_inputs))
        self._table.commit(opens_shot)

    def _with_cache(self, inputs: dict[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
        table = torch.tensor(self._table.plan().table, dtype=torch.int64, device=self._device)
        every = {**inputs, **self._text, **self._pages, "table": table}
        return {name: value for name, value in every.items() if name in names}
