"""How far the model of one stream recipe is from that of another, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.stream.denoise import Velocity, denoise, not_finite
from lltk.stream.positions import frame_positions
from lltk.stream.rollout import Rollout
from lltk.stream.sampler import Schedule

OUTPUT = "output"


@dataclass
class Errors:
    """Sums of squared differences and of squared values, by layer; the output's is `OUTPUT`."""

    lost: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    size: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        """Add the values of a pass to the sums."""
        for name, value in wanted.items():
            self.lost[name] += float((ours[name].double() - value.double()).square().sum())
            self.size[name] += float(value.double().square().sum())

    def relative(self) -> dict[str, float]:
        """‖ours − wanted‖ / ‖wanted‖ over all passes."""
        return {name: (self.lost[name] / self.size[name]) ** 0.5 for name in self.size}


@contextmanager
def watched(module: ProgramModule) -> Iterator[dict[str, Tensor]]:
    """Keep what each block returned last, by its path: all its results in one float32 vector."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(block: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
            seen[path] = torch.cat([o.detach().float().flatten() for o in outputs])

        return hook

    handles = [b.register_forward_hook(keep(p)) for p, b in module.blocks_by_path.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_errors(
    base: tuple[Program, ProgramModule],
    other: tuple[Program, ProgramModule],
    text: Tensor,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Relative error of every block and of the output, over the denoising passes of a video.

    Both models see the latents that ``base`` makes, each over its own cache.

    Args:
        base, other: stream Programs of one model and geometry, and their modules.
        text: the prompt of each of N chunks, [B, N, S, E].
        steps: denoising passes of a chunk.
        seed: seed of the noise.

    Raises:
        ValueError: a block or the output of the other model is not finite.
    """
    rollouts = [Rollout(program, module) for program, module in (base, other)]
    programs = [base[0], other[0]]
    geometry, spec, device = base[0].geometry, base[0].spec, text.device
    schedule = Schedule.make(steps, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (text.shape[0], spec.channels, geometry.chunk, *geometry.latent(spec))
    errors = Errors()
    with watched(base[1]) as wanted, watched(other[1]) as found:

        def compared(chunk: int, positions: Tensor) -> Velocity:
            """The base model's velocity; on the way it is compared with the other's."""
            both = [rollout.velocity(positions) for rollout in rollouts]

            def velocity(latents: Tensor, timestep: Tensor, index: int) -> Tensor:
                ours, other = (each(latents, timestep, index).float() for each in both)
                made = {**found, OUTPUT: other}
                for path, value in made.items():
                    if not bool(value.isfinite().all()):
                        raise not_finite(chunk, f"pass {index}", path)
                errors.add(made, {**wanted, OUTPUT: ours})
                return ours

            return velocity

        for chunk in range(text.shape[1]):
            positions = frame_positions([0], geometry.chunk, first=chunk).to(device)
            for rollout, program in zip(rollouts, programs, strict=True):
                rollout.set_text(text[:, chunk].contiguous().to(program.dtype))
            noise = torch.randn(shape, generator=generator, device=device)
            clean = denoise(schedule, noise, compared(chunk, positions))
            for rollout, program in zip(rollouts, programs, strict=True):
                rollout.commit(clean.to(program.dtype), positions)
    return errors.relative()
