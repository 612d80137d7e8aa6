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
from lltk.stream.denoise import Velocity, denoise, not_finite
from lltk.stream.rollout import RuntimeRollout
from lltk.stream.runtimes import Runtime
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


@dataclass(frozen=True)
class Model:
    """What is compared: a runtime, and the module that it runs; None if its blocks are not seen."""

    runtime: Runtime
    module: ProgramModule | None = None


@contextmanager
def watched(module: ProgramModule | None) -> Iterator[dict[str, Tensor]]:
    """Keep what each block returned last, by its path: all its results in one float32 vector."""
    seen: dict[str, Tensor] = {}
    blocks = {} if module is None else module.blocks_by_path

    def keep(path: str) -> Any:
        def hook(block: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
            seen[path] = torch.cat([o.detach().float().flatten() for o in outputs])

        return hook

    handles = [b.register_forward_hook(keep(p)) for p, b in blocks.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_errors(
    base: Model,
    other: Model,
    text: Tensor,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Relative error of every block and of the output, over the denoising passes of a video.

    Both models see the latents that ``base`` makes, each over its own cache. Blocks are those that
    are seen in both.

    Args:
        base, other: of one model and geometry.
        text: the prompt of each of N chunks, [B, N, S, E].
        steps: denoising passes of a chunk.
        seed: seed of the noise.

    Raises:
        ValueError: a block or the output of the other model is not finite.
    """
    runtimes = [base.runtime, other.runtime]
    rollouts = list(map(RuntimeRollout, runtimes))
    geometry, spec, device = base.runtime.geometry, base.runtime.spec, text.device
    schedule = Schedule.make(steps, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (text.shape[0], spec.channels, geometry.chunk, *geometry.latent(spec))
    errors = Errors()
    with watched(base.module) as wanted, watched(other.module) as found:

        def compared(chunk: int) -> Velocity:
            """The base model's velocity; on the way it is compared with the other's."""
            both = [rollout.velocity(rollout.positions()) for rollout in rollouts]

            def velocity(latents: Tensor, timestep: Tensor, index: int) -> Tensor:
                ours, other = (each(latents, timestep, index).float() for each in both)
                made = {**found, OUTPUT: other}
                for path, value in made.items():
                    if not bool(value.isfinite().all()):
                        raise not_finite(chunk, f"pass {index}", path)
                both_seen = {path: value for path, value in wanted.items() if path in found}
                errors.add(made, {**both_seen, OUTPUT: ours})
                return ours

            return velocity

        for chunk in range(text.shape[1]):
            for rollout, runtime in zip(rollouts, runtimes, strict=True):
                rollout.set_text(text[:, chunk].contiguous().to(runtime.dtype))
            noise = torch.randn(shape, generator=generator, device=device)
            clean = denoise(schedule, noise, compared(chunk))
            for rollout, runtime in zip(rollouts, runtimes, strict=True):
                rollout.commit(clean.to(runtime.dtype), rollout.positions())
    return errors.relative()
