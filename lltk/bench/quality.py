"""Do generated shots of the tiny world show their captions, and keep what no caption tells?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lltk.bench.scorer import Reading, agreement, identity, read
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.models.tiny.world import FPS, STRIDE, Story, draw_shot
from lltk.stream.denoise import denoise
from lltk.stream.positions import frame_positions
from lltk.stream.rollout import Rollout
from lltk.stream.sampler import Schedule

PARTS = ("shape", "colour", "motion", "background")
"""What a caption tells."""
STRETCH = 2 * FPS
"""Frames that identity is read from: two seconds, more than a pulse."""


def draw_stories(seed: int, count: int, shots: int, chunks: int, chunk: int) -> list[Story]:
    """Videos of equally long shots.

    Args:
        seed: of the shots.
        count: videos.
        shots: of a video.
        chunks: of a shot.
        chunk: C, latent frames a chunk.
    """
    generator = torch.Generator().manual_seed(seed)
    opens = tuple(range(0, shots * chunks, chunks))
    frames = STRIDE * chunk * chunks * shots - STRIDE + 1
    return [
        Story(tuple(draw_shot(generator) for _ in opens), opens, chunk, frames)
        for _ in range(count)
    ]


@torch.no_grad()
def streamed(
    program: Program,
    module: ProgramModule,
    text: Tensor,
    opens: Sequence[int],
    steps: int,
    seed: int,
) -> Iterator[Tensor]:
    """Chunks of videos that are cut at the same places, [B, C, F, h, w] each, float32.

    Args:
        program: a lowered stream Program of batch B.
        module: the same Program, runnable.
        text: [B, N, S, E], a prompt a chunk.
        opens: chunks that open a shot.
        steps: denoising passes a chunk.
        seed: of the noise, which is drawn on the device.

    Raises:
        ValueError: a chunk is not finite.
    """
    rollout = Rollout(program, module)
    geometry, device = program.geometry, text.device
    schedule = Schedule.make(steps, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (geometry.batch, program.spec.channels, geometry.chunk, *geometry.latent(program.spec))
    for chunk in range(text.shape[1]):
        rollout.set_text(text[:, chunk].contiguous().to(program.dtype))
        positions = frame_positions([0], geometry.chunk, first=chunk).to(device)
        noise = torch.randn(shape, generator=generator, device=device)
        clean = denoise(schedule, noise, rollout.velocity(positions))
        if not bool(clean.isfinite().all()):
            raise ValueError(
                f"chunk {chunk}: its latents are not finite; lltk stream tells the layer and pass"
            )
        rollout.commit(clean.to(program.dtype), positions, chunk in opens)
        yield clean


@dataclass(frozen=True)
class ShotScore:
    """What one shot shows.

    Attributes:
        index: of the shot in its video; those after 0 follow a cut.
        right: `PARTS` that its frames show as its caption has them.
        kept: per cent of identity that its last two seconds share with its first two; NaN where
            the shot is shorter than four.
    """

    index: int
    right: tuple[bool, ...]
    kept: float


def score_video(video: Tensor, story: Story) -> list[ShotScore]:
    """Every shot of a video.

    Args:
        video: uint8 [F, 3, H, W].
        story: what it should show.
    """
    scores = []
    for index, (shot, span) in enumerate(zip(story.shots, story.spans, strict=True)):
        frames = video[span].float() / 127.5 - 1
        right = agreement(read(frames), shot.caption)
        kept = float("nan")
        if len(frames) >= 2 * STRETCH - STRIDE:
            kept = identity(read(frames[:STRETCH]), read(frames[-STRETCH:])).score
        scores.append(ShotScore(index, tuple(getattr(right, part) for part in PARTS), kept))
    return scores


def identity_over_time(video: Tensor, every: int = STRETCH) -> list[float]:
    """Per cent of identity that later stretches of a single shot share with its first two seconds.

    Args:
        video: uint8 [F, 3, H, W].
        every: frames between the beginnings of stretches.

    Returns:
        One a stretch, the second first.
    """

    def reading(start: int) -> Reading:
        return read(video[start : start + STRETCH].float() / 127.5 - 1)

    first = reading(0)
    starts = range(every, len(video) - STRETCH + 1, every)
    return [identity(first, reading(start)).score for start in starts]
