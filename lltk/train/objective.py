"""What a step minimises; flow matching, under teacher forcing or over the whole clip.

Flow matching: x_s = (1 − s)·x₀ + s·ε with ε ~ N(0, 1) and s = t/1000; the model predicts ε − x₀.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lltk.graph.diagnose import first_bad_node
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.train.data import Batch
from lltk.train.excerpt import excerpt, leaps
from lltk.train.graphs import Graphed

LEVELS = 1000
"""Noise levels of the grid; also what a timestep of pure noise is."""
SHIFT = 5.0
"""How far the grid leans towards noise (Wan2.2's)."""
_LARGEST_ERROR = 2.0
"""Times a prediction's: the errors of consecutive chunks add up."""


class Objective(Protocol):
    """What a step minimises: the sum of `loss` over its batches, divided by that of `count`."""

    @property
    def module(self) -> nn.Module:
        """What trains: its parameters that require gradients."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Values to start from under the parameters' names, in the precision of their file."""

    @property
    def clips(self) -> int:
        """Clips of a call."""

    def count(self, batch: Batch) -> int:
        """How much the batch weighs in the step's mean."""

    def loss(self, batch: Batch) -> Tensor:
        """The batch's loss, a float32 scalar, summed over what `count` counts."""

    def weights_changed(self) -> None:
        """Take note that the module runs with other weights from here on."""

    def first_bad(self, batch: Batch) -> str | None:
        """Where the first non-finite value of the batch's forward pass is, or None."""


@torch.no_grad()
def mean_loss(objective: Objective, batches: Iterable[Batch]) -> float:
    """The loss over batches, as a step over all of them would have it."""
    parts = [(float(objective.loss(batch)), objective.count(batch)) for batch in batches]
    return sum(loss for loss, _ in parts) / max(1, sum(count for _, count in parts))


def noise_grid(shift: float = SHIFT) -> Tensor:
    """Timesteps t = 1000·σ(1 − i/1000), i = 0 … 999, where σ(u) = shift·u / (1 + (shift − 1)·u).

    Returns:
        float32 [1000], from 1000 down, never 0.
    """
    u = 1 - torch.arange(LEVELS, dtype=torch.float64) / LEVELS
    return (LEVELS * shift * u / (1 + (shift - 1) * u)).float()


def level_weights(grid: Tensor) -> Tensor:
    """Loss weights over a grid, of mean 1: a bell about t = 500 that is 0 at the grid's lowest.

    y(t) = exp(−2·((t − 500)/1000)²); w = 1000·(y − min y) / Σ(y − min y).

    Returns:
        float32 [1000].
    """
    bell = torch.exp(-2 * ((grid.double() - LEVELS / 2) / LEVELS) ** 2)
    bell = bell - bell.min()
    return (LEVELS * bell / bell.sum()).float()


class FlowMatching:
    """Flow matching through a train or a reference Program.

    A train program sees clean and noisy latents of the clip and every chunk has a noise level of
    its own; a reference program sees the noisy clip, of one level. Levels are uniform over
    `noise_grid`. The squared error, a mean over a latent frame, is weighted by `level_weights` and
    summed over the frames that count.

    What a causal model will see when it streams are its own chunks and sinks of long ago. So a
    train program's clean chunks may carry the errors it makes itself, and noise, of neither of
    which it is told. The error of a chunk is that of x_s − s·v, times up to `_LARGEST_ERROR`; what
    opens a shot is without it: it is the shot's sink, and what others can be put right by. Clips
    longer than the program's are seen as an `excerpt`.

    A batch holds ``latents`` [B, C, F, h, w], normalised; ``text`` [B, N, S, E], one prompt a
    chunk; ``opens``, bool [B, N], chunks that open a shot; and, where clips are padded, ``valid``,
    bool [B, F].

    Args:
        program: causal or later, with weights.
        module: the same Program, runnable.
        image: share of clips whose first latent frame is given: noise-free in the noisy half too,
            at t = 0, and not counted.
        context_error: share of the clean chunks, of those that open no shot, that carry the
            model's error; costs a forward pass more.
        context_noise: largest noise level of the clean chunks.
        gap: as `excerpt` has it.
        graphs: whether to replay CUDA graphs.

    Raises:
        ValueError: the program is neither for training nor a reference, or is a reference, which
            has no clean chunks, and they should carry noise or errors.
    """

    def __init__(
        self,
        program: Program,
        module: ProgramModule,
        image: float = 0.0,
        context_error: float = 0.0,
        context_noise: float = 0.0,
        gap: float = 1.0,
        graphs: bool = False,
    ) -> None:
        if program.kind not in ("train", "reference"):
            raise ValueError(
                f"a {program.kind} program has no flow-matching objective; set the recipe's "
                "program to train or reference"
            )
        if program.kind == "reference" and (context_error or context_noise):
            raise ValueError(
                "train.context_error and train.context_noise: a reference program sees no clean "
                "chunks; remove them, or set the recipe's program to train"
            )
        self._program = program
        self._module = module
        self._image = image
        self._context_error = context_error
        self._context_noise = context_noise
        self._gap = gap
        flow = _Flow(module, program)
        self._flow = Graphed(flow) if graphs else flow
        self._grid = noise_grid()
        self._weights = level_weights(self._grid)
        self._device = next(module.parameters()).device
        self._quantised: dict[str, Tensor] = {}
        self.weights_changed()

    @property
    def module(self) -> ProgramModule:
        return self._module

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return self._program.weights

    @property
    def clips(self) -> int:
        return self._program.geometry.batch

    def count(self, batch: Batch) -> int:
        if "valid" in batch.tensors:  # else all excerpts count alike
            batch = self._excerpt(batch)
        return int(self._counted(batch).sum())

    def loss(self, batch: Batch) -> Tensor:
        batch = self._excerpt(batch)
        inputs, target, weight = self._prepared(batch)
        if self._context_error:
            inputs |= {"clean": self._mistaken(batch, inputs, target)}
        flow = self._flow(inputs)
        error = (flow.float() - target).square().mean(dim=(1, 3, 4))
        return (weight * error).sum()

    def weights_changed(self) -> None:
        self._quantised = self._module.quantised_weights()

    def first_bad(self, batch: Batch) -> str | None:
        inputs, _, _ = self._prepared(self._excerpt(batch))
        return first_bad_node(self._program, self._module, self._program.kind, inputs)

    def _excerpt(self, batch: Batch) -> Batch:
        return excerpt(batch, self._program.geometry, self._gap)

    def _counted(self, batch: Batch) -> Tensor:
        """Frames that count, bool [B, F]."""
        frames = self._program.geometry.frames
        counted = torch.ones(len(batch.indices), frames, dtype=torch.bool)
        if "valid" in batch.tensors:
            counted &= batch.tensors["valid"].cpu()
        counted[:, 0] &= ~self._given(batch)
        return counted

    def _given(self, batch: Batch) -> Tensor:
        """Clips whose first latent frame is given, bool [B]."""
        return batch.uniform("image") < self._image

    def _prepared(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The graph's inputs; the target, float32 [B, C, F, h, w]; frame weights [B, F]."""
        program, spec, device = self._program, self._program.spec, self._device
        clean = batch.tensors["latents"].to(device, torch.float32)
        _, channels, frames, height, width = clean.shape
        span = program.geometry.chunk if program.kind == "train" else frames
        level = batch.integers("level", LEVELS, frames // span).repeat_interleave(span, dim=1)
        weight = (self._weights[level] * self._counted(batch)).to(device)
        timestep = self._grid[level]
        timestep[self._given(batch), 0] = 0
        timestep = timestep.to(device)
        sigma = (timestep / LEVELS)[:, None, :, None, None]
        noise = batch.normal("noise", channels, frames, height, width, device=device)
        noisy = (1 - sigma) * clean + sigma * noise
        latents = (
            {"clean": self._context(batch, clean), "noisy": noisy}
            if program.kind == "train"
            else {spec.latent_input: noisy}
        )
        inputs = latents | {
            spec.time_input: timestep,
            spec.text_input: batch.tensors["text"],
            "positions": batch.tensors["positions"],
            "random": torch.tensor([batch.seed, batch.indices.start]),
            **self._quantised,
        }
        contract = program.contract(program.kind).inputs
        cast = {name: inputs[name].to(device, own.dtype) for name, own in contract.items()}
        return cast, noise - clean, weight

    def _context(self, batch: Batch, clean: Tensor) -> Tensor:
        """The clean chunks as others see them: with noise of a level uniform up to the largest."""
        if not self._context_noise:
            return clean
        chunks = self._program.geometry.chunks
        level = self._spread(self._context_noise * batch.uniform("context level", chunks))
        noise = batch.normal("context", *clean.shape[1:], device=clean.device)
        return (1 - level) * clean + level * noise

    @torch.no_grad()
    def _mistaken(self, batch: Batch, inputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """The clean chunks, some with the error of what the model makes of the noisy ones.

        Of x_s − s·v that is s·(ε − x₀ − v). Chunks after a leap are spared as well: little tells
        what they should be.
        """
        sigma = (inputs["timestep"] / LEVELS)[:, None, :, None, None]
        error = sigma * (target - self._flow(inputs))
        geometry = self._program.geometry
        follows = ~leaps(batch.tensors["positions"], geometry.chunk)
        share, size = batch.uniform("error", 2, geometry.chunks).unbind(1)
        chosen = (share < self._context_error) & follows & ~batch.tensors["opens"].cpu()
        clean = inputs["clean"]
        return (clean + self._spread(_LARGEST_ERROR * size * chosen) * error).to(clean.dtype)

    def _spread(self, values: Tensor) -> Tensor:
        """A chunk's value [B, N] for each of its frames, [B, 1, F, 1, 1] on the device."""
        frames = values.repeat_interleave(self._program.geometry.chunk, dim=1)
        return frames.to(self._device)[:, None, :, None, None]


class _Flow(nn.Module):
    """The one output of a Program that trains, from its inputs by name."""

    def __init__(self, module: ProgramModule, program: Program) -> None:
        super().__init__()
        self._module = module
        self._kind = program.kind
        self._output = program.spec.output

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._module(self._kind, dict(inputs))[self._output]
