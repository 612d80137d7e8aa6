"""Clips as a few-step student makes them, for its own training (backward simulation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.stream.denoise import Velocity, denoise
from lltk.stream.positions import frame_positions
from lltk.stream.rollout import GraphedRollout, Rollout, RuntimeRollout
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.stream.sampler import Schedule
from lltk.train.data import Batch


@dataclass(frozen=True)
class Scene:
    """What a clip is made from, and what all networks are told of it.

    Attributes:
        noise: unit variance, float32 [B, C, F, h, w].
        text: a prompt a chunk, [B, N, S, E].
        positions: the frames' RoPE positions, float64 [F].
        opens: whether each chunk is the first of a shot; the cache's sinks follow it.
        image: the first frame where it is given, float32 [B, C, 1, h, w]; None where it is not.
    """

    noise: Tensor
    text: Tensor
    positions: Tensor
    opens: Sequence[bool]
    image: Tensor | None = None

    def given(self) -> Tensor:
        """Which frames are given, bool [F] on the noise's device."""
        frames = torch.arange(self.noise.shape[2], device=self.noise.device)
        return frames < (0 if self.image is None else 1)


def simulate(rollout: RuntimeRollout, schedule: Schedule, scene: Scene, passes: int) -> Tensor:
    """A clip, chunk by chunk through the deployment's sampler and cache.

    Each chunk gets so many passes of the schedule. What the last of them predicts is the chunk: it
    is committed, and later chunks attend to it. Gradients flow through that pass alone, and what is
    committed is a constant.

    Args:
        rollout: over the student's stream graphs, with no chunk in its table.
        schedule: the deployment's, on the noise's device.
        scene: of the clip.
        passes: 1 to the schedule's steps.

    Returns:
        The clip, float32 [B, C, F, h, w].
    """
    chunk = scene.noise.shape[2] // len(scene.opens)
    made = []
    for number, opens in enumerate(scene.opens):
        frames = slice(number * chunk, (number + 1) * chunk)
        positions = scene.positions[frames]
        rollout.set_text(scene.text[:, number])
        velocity = partial(_last_with_gradients, rollout.velocity(positions), passes - 1)
        image = scene.image if number == 0 else None
        made.append(denoise(schedule, scene.noise[:, :, frames], velocity, image, passes))
        if frames.stop < len(scene.positions):  # nothing attends to the last chunk
            rollout.commit(made[-1].detach().to(rollout.dtype), positions, opens)
    return torch.cat(made, dim=2)


def _last_with_gradients(
    velocity: Velocity, last: int, latents: Tensor, timestep: Tensor, index: int
) -> Tensor:
    """A pass of the chunk in flight, in which gradients flow if it is the last."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and index == last):
        return velocity(latents, timestep, index)


class Simulation:
    """Makes the clips on which a student and its critic train.

    Args:
        program: the student's, a causal stream Program (or later).
        module: the same Program, runnable.
        steps: numbers of passes that a chunk may have where the student is used; each clip is of
            one of them.
        shift: the sampler's.
        offset: φ, by which positions shift at a cut.
        image: share of the calls whose clips' first frames are given.
        batch: clips of an update.
        exit: the pass at which chunks stop: ``any`` or ``last``.
        graphs: whether passes without gradients are made by CUDA graphs: all of the critic's clips,
            and of the student's, where no chunk is evicted, the commits and the passes before a
            chunk's last one. One cache is kept for all clips, so the gradients of one are computed
            before the next is made.
    """

    def __init__(
        self,
        program: Program,
        module: ProgramModule,
        steps: Sequence[int],
        shift: float,
        offset: float,
        image: float,
        batch: int,
        exit: Literal["any", "last"] = "any",
        graphs: bool = False,
    ) -> None:
        self._program = program
        self._module = module
        self._device = next(module.parameters()).device
        self._schedules = [Schedule.make(count, shift, self._device) for count in steps]
        self._offset = offset
        self._image = image
        self._batch = batch
        self._exit = exit
        self._graphed = TorchRuntime(program, module, cuda_graphs=True) if graphs else None
        self._eager = TorchRuntime(program, module) if graphs else None

    @property
    def frames(self) -> int:
        """Latent frames of a clip."""
        return self._program.geometry.frames

    def given(self, batch: Batch) -> bool:
        """Whether the first frames of a batch's clips are given."""
        return bool(batch.uniform("image")[0] < self._image)

    def scene(self, batch: Batch, purpose: str) -> Scene:
        """What the clips of a batch are made from.

        Args:
            batch: has ``text`` and ``opens`` for at least as many chunks as a clip, and
                ``latents``, of which only a given first frame is read.
            purpose: clips for other purposes have other noise.
        """
        geometry, spec = self._program.geometry, self._program.spec
        shape = (spec.channels, geometry.frames, *geometry.latent(spec))
        opens = batch.tensors["opens"][0, : geometry.chunks].tolist()
        shots = torch.tensor([False, *opens[1:]]).cumsum(0).tolist()
        first = batch.tensors["latents"][:, :, :1] if self.given(batch) else None
        return Scene(
            batch.normal(f"{purpose} noise", *shape, device=self._device),
            batch.tensors["text"][:, : geometry.chunks].to(self._device, self._program.dtype),
            frame_positions(shots, geometry.chunk, self._offset).to(self._device),
            opens,
            None if first is None else first.to(self._device, torch.float32),
        )

    def clips(self, batch: Batch, purpose: str, scene: Scene) -> Tensor:
        """The clips of a scene, float32 [B, C, F, h, w], by the `passes` of their update."""
        schedule, passes = self.passes(batch, purpose)
        return simulate(self._rollout(), schedule, scene, passes)

    def _rollout(self) -> RuntimeRollout:
        """What makes a clip, over an empty cache."""
        geometry = self._program.geometry
        evicts = geometry.chunks > geometry.pages
        if self._graphed is None or self._eager is None or (evicts and torch.is_grad_enabled()):
            return Rollout(self._program, self._module)
        return GraphedRollout(self._graphed, self._eager)

    def passes(self, batch: Batch, purpose: str) -> tuple[Schedule, int]:
        """The schedule of a batch's chunks, and how many of its passes they get; both drawn.

        They are the same for all clips of an update, on all ranks, which so make as many passes.
        """
        update = batch.indices.start // self._batch
        drawn = Batch(batch.seed, range(update, update + 1), {})
        schedule = self._schedules[int(drawn.integers(f"{purpose} steps", len(self._schedules)))]
        if self._exit == "last":
            return schedule, schedule.steps
        return schedule, 1 + int(drawn.integers(f"{purpose} exit", schedule.steps))
