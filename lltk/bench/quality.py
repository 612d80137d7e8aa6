"""Whether generated shots of the tiny world show their captions and keep their identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lltk.bench.scorer import Reading, agreement, distances, identity, read
from lltk.models.tiny.world import FPS, STRIDE, Story, draw_shot
from lltk.stream.denoise import denoise
from lltk.stream.rollout import RuntimeRollout
from lltk.stream.runtimes import Runtime
from lltk.stream.sampler import Schedule
from lltk.stream.video import signal

PARTS = ("shape", "colour", "motion", "background")
"""The parts of a caption."""
DISTANCES = {
    "first_frame": "first frames' distance",
    "other_frames": "other frames' distance",
}
"""What a table calls the distances of `lltk.bench.agreement.Agreement`."""
STRETCH = 2 * FPS
"""Frames from which identity is read: two seconds, which is longer than a pulse."""


def draw_stories(seed: int, count: int, shots: int, chunks: int, chunk: int) -> list[Story]:
    """Draw videos of equally long shots.

    Args:
        seed: seed of the shots.
        count: how many videos.
        shots: shots of a video.
        chunks: chunks of a shot.
        chunk: latent frames of a chunk.
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
    runtime: Runtime,
    text: Tensor,
    opens: Sequence[int],
    steps: int,
    seed: int,
) -> Iterator[Tensor]:
    """Stream B videos at once; yield each chunk's latents, float32 [B, C, F, h, w].

    Args:
        runtime: of a stream of batch B.
        text: the prompt of each of N chunks, [B, N, S, E].
        opens: the chunks that open a shot, in all videos.
        steps: denoising passes of a chunk.
        seed: seed of the noise, which is drawn on the device.

    Raises:
        ValueError: a chunk's latents are not finite.
    """
    rollout = RuntimeRollout(runtime)
    geometry, spec, device = runtime.geometry, runtime.spec, text.device
    schedule = Schedule.make(steps, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (geometry.batch, spec.channels, geometry.chunk, *geometry.latent(spec))
    for chunk in range(text.shape[1]):
        rollout.set_text(text[:, chunk].contiguous().to(runtime.dtype))
        positions = rollout.positions()
        noise = torch.randn(shape, generator=generator, device=device)
        clean = denoise(schedule, noise, rollout.velocity(positions))
        if not bool(clean.isfinite().all()):
            raise ValueError(
                f"chunk {chunk}: its latents are not finite; lltk stream tells the layer and pass"
            )
        rollout.commit(clean.to(runtime.dtype), positions, chunk in opens)
        yield clean


@dataclass(frozen=True)
class ShotScore:
    """What one shot shows.

    Attributes:
        index: the shot's place in its video; all but shot 0 follow a cut.
        right: for each of `PARTS`, whether the frames show it as the caption says.
        kept: how much of its first two seconds' identity its last two keep, in per cent; NaN if the
            shot is shorter than four seconds.
        first: how far its first frame is from the world's drawing of what the shot shows, as
            `distances` has it.
        rest: the same of its other frames, the root of their mean square.
        tint: the hue of its background, in turns; no caption tells it.
    """

    index: int
    right: tuple[bool, ...]
    kept: float
    first: float
    rest: float
    tint: float


def score_video(video: Tensor, story: Story) -> list[ShotScore]:
    """Score every shot of a video.

    Args:
        video: uint8 [F, 3, H, W].
        story: what the video should show.
    """
    scores = []
    for index, (shot, span) in enumerate(zip(story.shots, story.spans, strict=True)):
        frames = signal(video[span])
        shown = read(frames)
        right = agreement(shown, shot.caption)
        off = distances(frames, shown)
        kept = float("nan")
        if len(frames) >= 2 * STRETCH - STRIDE:
            kept = identity(read(frames[:STRETCH]), read(frames[-STRETCH:])).score
        parts = tuple(getattr(right, part) for part in PARTS)
        rest = float(off[1:].square().mean().sqrt())
        scores.append(ShotScore(index, parts, kept, float(off[0]), rest, shown.tint))
    return scores


def identity_over_time(video: Tensor, every: int = STRETCH) -> list[float]:
    """How much of its first two seconds' identity a single shot keeps later, in per cent.

    Args:
        video: uint8 [F, 3, H, W].
        every: frames between the beginnings of two stretches.

    Returns:
        A value for each stretch after the first.
    """

    def reading(start: int) -> Reading:
        return read(signal(video[start : start + STRETCH]))

    first = reading(0)
    starts = range(every, len(video) - STRETCH + 1, every)
    return [identity(first, reading(start)).score for start in starts]
