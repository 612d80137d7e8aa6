"""From noise to clean latents: the denoising loop, and a chunk's passes through its graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lltk.stream.runtimes import Runtime
from lltk.stream.sampler import Sampler, Schedule, guided
from lltk.stream.timing import Stopwatch

Velocity = Callable[[Tensor, Tensor, int], Tensor]
"""The model: noisy latents [B, C, F, h, w], timesteps [B, F] and a pass's index to the velocity."""


def denoise(
    schedule: Schedule,
    noise: Tensor,
    velocity: Velocity,
    image: Tensor | None = None,
    passes: int | None = None,
) -> Tensor:
    """Run the passes of a schedule.

    Gradients flow as they do through the velocity.

    Args:
        schedule: on the noise's device.
        noise: [B, C, F, h, w], unit variance.
        velocity: the model's, of the noise's shape in any floating dtype. It gets float32 latents
            and float32 timesteps.
        image: the clean first frame, float32 [B, C, 1, h, w]; None where all frames are noise. It
            takes the place of the first frame in every pass, at t = 0, and in the result.
        passes: how many to run, at least one; None for all.

    Returns:
        Clean latents as the last of these passes predicts them, float32 [B, C, F, h, w].
    """
    sampler = Sampler(schedule, noise)
    for index in range(schedule.steps if passes is None else passes):
        latents = _with_first(image, sampler.latents)
        timestep = sampler.timestep(index).repeat(len(latents), latents.shape[2])
        if image is not None:
            timestep[:, 0] = 0
        sampler.step(index, velocity(latents, timestep, index))
    return _with_first(image, sampler.result)


def _with_first(image: Tensor | None, latents: Tensor) -> Tensor:
    """The latents with the image as their first frame, if there is one."""
    return latents if image is None else torch.cat([image, latents[:, :, 1:]], dim=2)


def chunk_noise(seed: int, chunk: int, shape: Sequence[int]) -> Tensor:
    """A session's noise for one chunk, float32, on the CPU.

    That of batch item b depends on seed + b and the chunk alone, so that sessions and batch items
    share no random state.

    Args:
        seed: the session's.
        chunk: its index.
        shape: [B, C, F, h, w].
    """
    items = range(shape[0])
    noise = [torch.randn(*shape[1:], generator=_generator(seed + i, chunk)) for i in items]
    return torch.stack(noise)


def _generator(seed: int, chunk: int) -> torch.Generator:
    digest = hashlib.sha256(f"noise {seed} {chunk}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def not_finite(chunk: int, during: str, where: str) -> ValueError:
    """What to raise where a value of a model is not finite.

    Args:
        chunk: the index of the chunk that was being made.
        during: the pass, commit or recache in which the value came up.
        where: the first such value.
    """
    return ValueError(
        f"chunk {chunk}, {during}: {where} is not finite; keep its layer in high precision, or use "
        "other weights"
    )


class Denoiser:
    """Makes chunks of clean latents with a stream's graphs.

    Args:
        runtimes: the prompt's; with guidance, then the negative prompt's.
        schedule: on their device.
        guidance: g of u + g (c - u); 1 for none.
        watch: measures the passes as ``step``.
    """

    def __init__(
        self, runtimes: Sequence[Runtime], schedule: Schedule, guidance: float, watch: Stopwatch
    ) -> None:
        assert len(runtimes) == (1 if guidance == 1 else 2)
        self._runtimes = runtimes
        self._schedule = schedule
        self._guidance = guidance
        self._watch = watch

    def __call__(
        self, noise: Tensor, positions: Tensor, table: Sequence[int], image: Tensor | None = None
    ) -> Tensor:
        """Clean latents of a chunk, float32 of the noise's shape; waits for no device.

        Args:
            noise, image: see `denoise`.
            positions: RoPE positions, as `Runtime.step` takes them.
            table: committed pages to attend to.
        """
        velocity = partial(self._velocity, positions, table)
        return denoise(self._schedule, noise, velocity, image)

    def blame(
        self,
        chunk: int,
        noise: Tensor,
        positions: Tensor,
        table: Sequence[int],
        image: Tensor | None = None,
    ) -> ValueError:
        """What to raise where a chunk's latents are not finite: says where that begins.

        It makes the passes again and looks at every value in them.

        Args:
            chunk: its index.
            noise, positions, table, image: as they were.
        """

        def look(latents: Tensor, timestep: Tensor, index: int) -> Tensor:
            for runtime in self._runtimes:
                given = latents.to(runtime.dtype), timestep, positions, table, index
                if found := runtime.first_bad(*given):
                    raise not_finite(chunk, f"pass {index}", found)
            return self._velocity(positions, table, latents, timestep, index)

        try:
            denoise(self._schedule, noise, look, image)
        except ValueError as error:
            return error
        return ValueError(f"chunk {chunk}: the sampler's latents are not finite")

    def _velocity(
        self,
        positions: Tensor,
        table: Sequence[int],
        latents: Tensor,
        timestep: Tensor,
        index: int,
    ) -> Tensor:
        with self._watch.measure("step"):
            samples = [
                runtime.step(latents.to(runtime.dtype), timestep, positions, table, index)
                for runtime in self._runtimes
            ]
        return samples[0] if len(samples) == 1 else guided(samples[0], samples[1], self._guidance)
