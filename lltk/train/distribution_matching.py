"""Distribution matching distillation (DMD): the student's gradient and the critic's loss.

A clip x of the student is noised to x_t = (1 − s)·x + s·ε. Two score networks predict clean clips
from it: the real score, which knows the data's distribution, and the fake score (the critic), which
knows the student's. Where they differ, the student is to move from the fake to the real one (Yin et
al., 2024, arXiv:2405.14867)::

    g = (fake − real) / mean |x − real|,   the student's loss = ½·mean g²,   d loss / dx = g / count

with a mean for each chunk. All formulas are in float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lltk.graph.contract import Role
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.stream.sampler import guided
from lltk.train.graphs import Graphed, OneOutput
from lltk.train.share import Share
from lltk.train.simulation import Scene

LEAST_DISTANCE = 1e-6
"""The least that g is divided by. Latents have unit variance."""


@dataclass(frozen=True)
class Noised:
    """A clip at the noise levels at which its scores are compared.

    Attributes:
        latents: x_t, float32 [B, C, F, h, w]; a given frame is free of noise.
        timestep: t, float32 [B, F]; 0 in a given frame.
        sigma: s, float32 [B, F]; 0 in a given frame.
    """

    latents: Tensor
    timestep: Tensor
    sigma: Tensor

    @classmethod
    def make(
        cls, clip: Tensor, noise: Tensor, timestep: Tensor, sigma: Tensor, scene: Scene
    ) -> Noised:
        """Noise a clip.

        Args:
            clip, noise: float32 [B, C, F, h, w].
            timestep, sigma: float32 [B, F].
            scene: says which frames are given.
        """
        free = (~scene.given()).to(clip.dtype)
        timestep, sigma = timestep * free, sigma * free
        level = _of_frames(sigma)
        return cls((1 - level) * clip + level * noise, timestep, sigma)

    def clean(self, velocity: Tensor) -> Tensor:
        """The clean clip that a velocity means: x₀ = x_t − s·v."""
        return self.latents - _of_frames(self.sigma) * velocity


class Score:
    """A network that sees a whole noisy clip, causally by chunks.

    Ranks that share clips each have all of a clip, and of the velocity; the network sees their
    parts.

    Args:
        program: a score Program, causal or later.
        module: the same Program, runnable.
        graphs: whether to replay CUDA graphs. A velocity then lasts until the next call.
    """

    def __init__(self, program: Program, module: ProgramModule, graphs: bool = False) -> None:
        self._contract = program.contract(program.kind)
        self._share = Share(program)
        self.module = module
        velocity = OneOutput(module, program)
        self._velocity = Graphed(velocity) if graphs else velocity

    def __call__(self, noised: Noised, text: Tensor, positions: Tensor) -> Tensor:
        """Its velocity, float32 [B, C, F, h, w], of prompts [B, N, S, E]."""
        values = {
            Role.LATENTS: noised.latents,
            Role.TIME: noised.timestep,
            Role.TEXT: text,
            Role.POSITIONS: positions,
        }
        named = self._contract.named(values)
        inputs = [
            self._share.own(named[name], like.shape).to(like.dtype)
            for name, like in self._contract.inputs.items()
        ]
        velocity = self._share.whole(self._velocity(*inputs), axis=2)
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))


@dataclass(frozen=True)
class Scores:
    """What both networks take a noisy clip for; float32 [B, C, F, h, w] each.

    Attributes:
        conditional, unconditional: the real score, of the clip's prompts and of the negative one;
            the latter is None without guidance.
        real: the two, guided.
        fake: the fake score, of the clip's prompts.
    """

    conditional: Tensor
    unconditional: Tensor | None
    real: Tensor
    fake: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, real: Score, fake: Score, noised: Noised, scene: Scene, negative: Tensor, scale: float
    ) -> Scores:
        """Ask both networks.

        Args:
            real, fake: the networks.
            noised: the clip.
            scene: what it was made from.
            negative: the negative prompt, [S, E].
            scale: g of u + g·(c − u); 1 for no guidance.
        """
        c, f = (noised.clean(n(noised, scene.text, scene.positions)) for n in (real, fake))
        if scale == 1:
            return cls(c, None, c, f)
        nothing = negative.expand_as(scene.text)
        u = noised.clean(real(noised, nothing, scene.positions))
        return cls(c, u, guided(c, u, scale), f)


def direction(clip: Tensor, scores: Scores, chunks: int) -> tuple[Tensor, Tensor]:
    """Where the student's clip should not go, g, and what it is divided by.

    Args:
        clip: x, float32 [B, C, F, h, w].
        scores: of the clip, noised.
        chunks: N.

    Returns:
        g, of the clip's shape; and mean |x − real| of each chunk, [B, N]. A given frame counts in
        the mean, with no distance.
    """
    distance = (clip.detach() - scores.real).abs().mean(dim=(1, 3, 4))
    normaliser = distance.unflatten(1, (chunks, -1)).mean(2)
    frames = normaliser.clamp(min=LEAST_DISTANCE).repeat_interleave(clip.shape[2] // chunks, dim=1)
    return (scores.fake - scores.real) / _of_frames(frames), normaliser


def student_loss(clip: Tensor, g: Tensor, scene: Scene) -> Tensor:
    """½·g², averaged over the values of each frame, and 0 in a given one; float64 [B, F].

    The gradient of its sum in the clip is g, likewise.
    """
    wide = clip.double()
    target = wide.detach() - g.double()
    return 0.5 * _by_frame((wide - target).square(), scene)


def critic_loss(velocity: Tensor, clip: Tensor, noise: Tensor, scene: Scene) -> Tensor:
    """(v − (ε − x))², averaged over each frame's values, and 0 in a given one; [B, F]."""
    return _by_frame((velocity - (noise - clip)).square(), scene)


def _by_frame(values: Tensor, scene: Scene) -> Tensor:
    return values.mean(dim=(1, 3, 4)) * ~scene.given()


def _of_frames(values: Tensor) -> Tensor:
    """Values [B, F] that go with latents."""
    return values[:, None, :, None, None]
