"""Error recycling: a model trains on the errors that it made before.

While it streams, a model goes on from what it made itself, errors included. In training it goes on
from clean latents. So the errors of its predictions are kept, a chunk each, and some are later
added to what it is given:

- to the latents that are noised, and to the noise: an error of a noise level close by;
- to the clean chunks: an error of any noise level.

With x_s = (1 − s)·x₀ + s·ε and the prediction v, the latents' error is x_s − s·v − x₀, and the
noise's (1 − s)·(v − (ε − x₀)). The model predicts ε − x₀ from the x₀ without error and the ε with
it. From Stable Video Infinity, as LongLive-2.0 has it.

There, each of the ranks that share a clip owns every N-th bucket, and its chunks carry errors of
those alone. So what is learned depends on the number of ranks. Here it does so only where
``owners`` asks for it, and then on any ranks as on so many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lltk.parallel.mesh import ALONE, Mesh
from lltk.train.noise_levels import LEVELS
from lltk.train.recipe import ErrorRecyclingSection

_KINDS = ("latent", "noise")
GATES = ("clean", "noise", "latent", "context", "update")
"""What is decided for a sample, in the order of its numbers of the purpose ``recycling``."""
_SHARED = 50
"""Steps of which all errors are kept, whichever owner's chunks they come from; LongLive-2.0's."""
_STEPS = "steps"


class Draws(Protocol):
    """Random numbers for the samples of a batch. A `lltk.train.data.Batch` has them."""

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Numbers uniform in [0, 1), float [B, *shape], on the CPU."""


class ErrorBuffer:
    """Errors of whole chunks on the CPU, by noise level.

    Levels that follow each other share a bucket. Once a bucket is full, a new error replaces any of
    its errors. Owner r of N has the buckets r, r + N, …

    Args:
        buckets: into which the levels are divided.
        capacity: most errors in a bucket.
        shape: of an error.
        dtype: in which errors are kept.
        owners: how many owners there are.
    """

    def __init__(
        self,
        buckets: int,
        capacity: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        owners: int = 1,
    ) -> None:
        self._buckets: list[list[Tensor]] = [[] for _ in range(buckets)]
        self._capacity = capacity
        self.shape = tuple(shape)
        self._dtype = dtype
        self._owners = owners

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    def add(self, error: Tensor, level: int, draw: float) -> None:
        """Keep an error.

        Args:
            error: of the buffer's shape.
            level: the index of its noise level, from 0 (pure noise) to 999.
            draw: uniform in [0, 1); it says which error is replaced in a full bucket.
        """
        assert error.shape == self.shape
        bucket = self._buckets[self._bucket(level)]
        entry = error.detach().to("cpu", self._dtype, copy=True)
        if len(bucket) < self._capacity:
            bucket.append(entry)
        else:
            bucket[int(draw * len(bucket))] = entry

    def owner(self, level: int) -> int:
        """Who has a level's bucket."""
        return self._bucket(level) % self._owners

    def count(self, owner: int = 0) -> int:
        """How many errors an owner has."""
        return sum(map(len, self._buckets[owner :: self._owners]))

    def near(self, level: int, draw: float, owner: int = 0) -> Tensor | None:
        """An error of an owner's bucket that is nearest to a level's, the later of two; None if
        that is empty. The draw is uniform in [0, 1)."""
        own, wanted = range(owner, len(self._buckets), self._owners), self._bucket(level)
        bucket = self._buckets[min(own, key=lambda place: (abs(place - wanted), -place))]
        return bucket[int(draw * len(bucket))] if bucket else None

    def any(self, draw: float, owner: int = 0) -> Tensor | None:
        """Any of an owner's errors, all equally likely; None if there is none."""
        place = int(draw * self.count(owner))
        for bucket in self._buckets[owner :: self._owners]:
            if place < len(bucket):
                return bucket[place]
            place -= len(bucket)
        return None

    def state(self) -> dict[str, Tensor]:
        """The errors by their buckets' numbers and their own, such as ``49.0``."""
        return {
            f"{number}.{place}": error
            for number, bucket in enumerate(self._buckets)
            for place, error in enumerate(bucket)
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: there is an error in it that this buffer cannot have.
        """
        buckets: list[list[Tensor]] = [[] for _ in self._buckets]
        left = dict(state)
        for number, bucket in enumerate(buckets):
            while len(bucket) < self._capacity and (name := f"{number}.{len(bucket)}") in left:
                error = left.pop(name)
                if error.shape != self.shape or error.dtype != self._dtype:
                    raise ValueError(
                        f"{name} is {error.dtype} {list(error.shape)}, not {self._dtype} "
                        f"{list(self.shape)}"
                    )
                bucket.append(error.clone())
        if left:
            raise ValueError(
                f"{min(left)} is none of {len(buckets)} buckets of {self._capacity} errors"
            )
        self._buckets = buckets

    def _bucket(self, level: int) -> int:
        return level * len(self._buckets) // LEVELS


@dataclass(frozen=True)
class Given:
    """What a model is given, and what that is made of; B clips of N chunks, F frames in all.

    Attributes:
        clean: x₀ without errors, [B, C, F, h, w].
        latents: x₀ that is noised, likewise.
        noise: ε, likewise.
        context: the clean chunks, likewise.
        level: the index of each chunk's noise level, int64 [B, N], on the CPU.
        sigma: each frame's s, [B, F].
        counted: the frames that count in the loss, bool [B, F].
        kept: the chunks of which errors are to be kept, bool [B, N].
    """

    clean: Tensor
    latents: Tensor
    noise: Tensor
    context: Tensor
    level: Tensor
    sigma: Tensor
    counted: Tensor
    kept: Tensor

    @property
    def noisy(self) -> Tensor:
        """x_s."""
        sigma = _spread(self.sigma, self.latents)
        return (1 - sigma) * self.latents + sigma * self.noise

    @property
    def target(self) -> Tensor:
        """What the model should predict: ε with its errors, less x₀ without."""
        return self.noise - self.clean


def without_errors(
    clean: Tensor, noise: Tensor, level: Tensor, sigma: Tensor, counted: Tensor
) -> Given:
    """What a model is given where no errors are added, nor kept; see `Given`."""
    none = torch.zeros(level.shape, dtype=torch.bool)
    return Given(clean, clean, noise, clean, level, sigma, counted, none)


class ErrorRecycling:
    """Keeps errors and adds them to what a model is given.

    The errors of a step are kept at its end, in the order of its clips. So what happens to a clip
    depends neither on how the step is split into calls nor on which rank has which clip. Every rank
    keeps the same errors.

    With several owners, consecutive chunks of a clip are each owner's share. What is decided for a
    clip is decided for each share. After the first steps, an error is only kept if the owner of
    its chunk has its bucket.

    Args:
        section: how often, and how much is kept.
        shape: of a chunk's latents, [C, f, h, w].
        dtype: in which errors are kept.
        chunks: of a clip.

    Raises:
        ValueError: the memory that the section allows does not hold an error a bucket, or owners do
            not divide the chunks, or are more than the buckets.
    """

    def __init__(
        self,
        section: ErrorRecyclingSection,
        shape: Sequence[int],
        dtype: torch.dtype,
        chunks: int,
    ) -> None:
        if section.owners > section.buckets:
            raise ValueError(
                f"train.error_recycling.owners: {section.owners} are more than the "
                f"{section.buckets} buckets; set at most so many"
            )
        if chunks % section.owners:
            fit = [number for number in range(1, chunks + 1) if chunks % number == 0]
            raise ValueError(
                f"train.error_recycling.owners: {section.owners} do not divide the {chunks} chunks "
                f"of a clip; set one of {fit}"
            )
        size = torch.Size(shape).numel() * dtype.itemsize
        fits = int(section.gigabytes * 1e9) // (2 * section.buckets * size)
        if not fits:
            least = 2 * section.buckets * size / 1e9
            raise ValueError(
                f"train.error_recycling.gigabytes: {section.gigabytes:g} GB do not hold an error "
                f"of {size / 1e6:.3g} MB in each of 2·{section.buckets} buckets; set at least "
                f"{least:.2g}, or fewer train.error_recycling.buckets"
            )
        self._section = section
        self._length = shape[1]
        capacity = min(section.entries, fits)
        self._buffers = {
            name: ErrorBuffer(section.buckets, capacity, shape, dtype, section.owners)
            for name in _KINDS
        }
        self._dtype = dtype
        self._share = chunks // section.owners
        self._steps = 0
        self._found: list[tuple[Tensor, Tensor]] = []

    def inject(self, draws: Draws, given: Given) -> Given:
        """Add errors to what a model is given. Frames that do not count carry none.

        Args:
            draws: random numbers for the clips.
            given: without errors.
        """
        section, gates = self._section, self._gates(draws)
        free = gates["clean"] < section.clean
        shares = {"latent": section.latent, "noise": section.noise, "context": section.context}
        chosen = {name: (gates[name] < share) & ~free for name, share in shares.items()}

        def carrying(name: str, values: Tensor) -> Tensor:
            errors = self._drawn(draws, name, chosen[name], given.level)
            counted = _spread(given.counted, values)
            return values if errors is None else values + errors.to(values) * counted

        return replace(
            given,
            latents=carrying("latent", given.latents),
            noise=carrying("noise", given.noise),
            context=carrying("context", given.context),
            kept=~free | (gates["update"] < section.update),
        )

    @torch.no_grad()
    def note(self, draws: Draws, given: Given, flow: Tensor) -> None:
        """Take the errors of a prediction, to keep them at the step's end.

        Errors of frames that do not count are 0, and chunks of such frames alone are not kept.

        Args:
            draws: random numbers for the clips.
            given: what the model was given.
            flow: v, what it predicted, [B, C, F, h, w].
        """
        sigma, counted = (_spread(part, given.clean) for part in (given.sigma, given.counted))
        latent = given.noisy - sigma * flow - given.clean
        noise = (1 - sigma) * (flow - given.target)
        errors = torch.stack([latent * counted, noise * counted], 1).to(self._dtype)
        chunks = errors.unflatten(3, (-1, self._length)).movedim(3, 1)
        kept = given.kept & given.counted.unflatten(1, (-1, self._length)).any(2)
        replaced = [draws.uniform(f"replaced {kind}", given.level.shape[1]) for kind in _KINDS]
        about = torch.stack([kept, given.level, *replaced], 2).double()
        self._found.append((chunks.contiguous(), about.to(flow.device)))

    def end_step(self, mesh: Mesh = ALONE) -> None:
        """Keep the errors that were taken, clip for clip and chunk for chunk."""
        for own, about in self._found:
            of_groups = zip(mesh.of_groups(own), mesh.of_groups(about), strict=True)
            for chunks, numbers in of_groups:
                for clip, row in zip(chunks.cpu(), numbers.tolist(), strict=True):
                    for chunk, (kept, level, *draws) in enumerate(row):
                        if kept:
                            self._keep(chunk, clip[chunk], int(level), draws)
        self._found.clear()
        self._steps += 1

    def _keep(self, chunk: int, errors: Tensor, level: int, draws: Sequence[float]) -> None:
        for kind, error, draw in zip(_KINDS, errors, draws, strict=True):
            buffer = self._buffers[kind]
            if self._steps < _SHARED or buffer.owner(level) == chunk // self._share:
                buffer.add(error, level, draw)

    def state(self) -> dict[str, Tensor]:
        """All errors, [C, f, h, w] each, under names such as ``latent.49.0``; ``steps``, an int64
        [], if there are owners."""
        errors = {
            f"{kind}.{name}": error
            for kind, buffer in self._buffers.items()
            for name, error in buffer.state().items()
        }
        return errors if self._section.owners == 1 else errors | {_STEPS: torch.tensor(self._steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: there is an error in it that these settings do not give.
        """
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        errors = dict(state)
        if self._section.owners > 1:
            if (steps := errors.pop(_STEPS, None)) is None:
                raise ValueError(f"{_STEPS}: is missing, by which owners know what to keep")
            self._steps = int(steps)
        for name, error in errors.items():
            kind, _, own = name.partition(".")
            if kind not in parts:
                raise ValueError(f"error {name}: is neither of latents nor of noise")
            parts[kind][own] = error
        for kind, buffer in self._buffers.items():
            try:
                buffer.load(parts[kind])
            except ValueError as error:
                raise ValueError(f"errors of the {kind}: {error}") from error

    def _drawn(self, draws: Draws, name: str, chosen: Tensor, level: Tensor) -> Tensor | None:
        """Errors for the chosen samples, float32 [B, C, F, h, w]; None if there are none at all.

        Args:
            draws: random numbers for the samples.
            name: to what the errors are added.
            chosen: the chunks that get errors, bool [B, N].
            level: the index of each chunk's noise level, int64 [B, N].
        """
        buffer = self._buffers["noise" if name == "noise" else "latent"]
        if not len(buffer) or not chosen.any():
            return None
        choice, scale = draws.uniform(f"recycled {name}", 2, level.shape[1]).unbind(1)
        scale = 1 + self._section.scale * (2 * scale - 1)
        found = torch.zeros(*level.shape, *buffer.shape)
        for sample, chunk in chosen.nonzero().tolist():
            draw, owner = float(choice[sample, chunk]), chunk // self._share
            if name == "context":
                error = buffer.any(draw, owner)
            else:
                error = buffer.near(int(level[sample, chunk]), draw, owner)
            if error is not None:
                found[sample, chunk] = scale[sample, chunk] * error
        return found.movedim(1, 2).flatten(2, 3)

    def _gates(self, draws: Draws) -> dict[str, Tensor]:
        """What is decided for each chunk, by name, [B, N]; it happens below a share."""
        drawn = draws.uniform("recycling", self._section.owners * len(GATES))
        every = drawn.unflatten(1, (-1, len(GATES))).repeat_interleave(self._share, 1)
        return dict(zip(GATES, every.unbind(2), strict=True))


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Values for frames, [B, F], as values for latents, [B, 1, F, 1, 1]."""
    return values.to(like)[:, None, :, None, None]
