"""How well a stream recipe's videos of the tiny world show their captions, over many shots."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean, stdev
from typing import TypeVar

import torch
from torch import Tensor

from lltk.bench.intervals import wilson
from lltk.bench.quality import (
    PARTS,
    ShotScore,
    identity_over_time,
    score_video,
    streamed,
)
from lltk.models.tiny.world import Story
from lltk.stream.script import SCENE_CUT
from lltk.stream.text import TextEncoder
from lltk.stream.video import levels
from lltk.streaming import Plan, StreamPlan, open_decoder, open_runtime

T = TypeVar("T")
Interval = tuple[float, float, float]
"""A value and its 95 % confidence limits, in per cent."""


@dataclass(frozen=True)
class Agreement:
    """What shots show.

    Attributes:
        shots: how many shots there are.
        agreement: share of shots that show their caption's shape, colour, motion and background.
        later: how many shots follow a cut.
        after_cut: `agreement` of these; None if there are none.
        parts: share of shots that show the caption's shape, its colour, and so on.
        identity: how much of the first two seconds' identity the last two keep; None if every shot
            is shorter than four seconds.
        first_frame: how far shots' first frames are from the world's drawing of what the shots
            show: the root of the mean square of the difference, in per cent of a channel's range.
        other_frames: the same of their other frames.
        tint_spread: how far the hues of backgrounds are spread, which no caption tells: 0 if all
            are one, and near 100 if all are as frequent.
    """

    shots: int
    agreement: Interval
    later: int
    after_cut: Interval | None
    parts: dict[str, Interval]
    identity: Interval | None
    first_frame: Interval
    other_frames: Interval
    tint_spread: float


@dataclass(frozen=True)
class Lasting:
    """How much of their first two seconds' identity long single shots keep over time, in per cent.

    Attributes:
        early: in seconds 2 to 4.
        late: in the last four seconds.
        change: from early to late in the same shots, in percentage points.
        over_time: the shots' mean in every two seconds, from second 2 on.
    """

    early: Interval
    late: Interval
    change: Interval
    over_time: list[float]


def summarise(scores: Sequence[ShotScore]) -> Agreement:
    """What the scores of shots say together; there is at least one."""
    later = [score for score in scores if score.index]
    kept = [score.kept for score in scores if not math.isnan(score.kept)]
    hues = [cmath.rect(1, 2 * math.pi * score.tint) for score in scores]
    return Agreement(
        len(scores),
        share([all(score.right) for score in scores]),
        len(later),
        share([all(score.right) for score in later]) if later else None,
        {part: share([score.right[i] for score in scores]) for i, part in enumerate(PARTS)},
        mean(kept) if kept else None,
        mean([score.first for score in scores]),
        mean([score.rest for score in scores]),
        100 * (1 - abs(sum(hues) / len(hues))),
    )


def share(hits: Sequence[bool]) -> Interval:
    """The share of hits that are true, in per cent, with Wilson's interval."""
    low, high = wilson(sum(hits), len(hits))
    return 100 * fmean(hits), 100 * low, 100 * high


def mean(values: Sequence[float]) -> Interval:
    """The mean of percentages, with its interval; a single value's interval is itself."""
    middle, low, high = _mean(values)
    return middle, max(0.0, low), min(100.0, high)


def _mean(values: Sequence[float]) -> Interval:
    middle = fmean(values)
    reach = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return middle, middle - reach, middle + reach


def overlap(a: Interval, b: Interval) -> bool:
    """Whether two intervals have a value in common."""
    return a[1] <= b[2] and b[1] <= a[2]


def interval(values: Interval | Sequence[float] | None) -> str:
    """An interval as text, such as ``93.3 (84.0 to 97.4)``; a dash for None."""
    return "–" if values is None else "{:.1f} ({:.1f} to {:.1f})".format(*values)


def encoded(plan: Plan, stories: Sequence[Story]) -> Tensor:
    """The prompts of equally long stories, [B, N, S, E], on the transformer's device."""
    encoder = plan.text_encoder(None)
    if isinstance(plan, StreamPlan):  # in float32, be the transformer's dtype narrower
        encoder = TextEncoder(plan.folder, plan.geometry.text_tokens, device=plan.device)
    texts = [prompt for story in stories for prompt in story.prompts(SCENE_CUT)]
    return encoder.encode(texts).unflatten(0, (len(stories), -1)).to(plan.device)


def decoded(plan: Plan, latents: Iterator[Tensor]) -> list[Tensor]:
    """Decode latents that come chunk by chunk; each video is uint8 [F, 3, H, W] on the CPU."""
    decoder = open_decoder(plan)
    parts = []
    for chunk in latents:
        video = decoder.decode(chunk.to(plan.decoder_device))
        parts.append(levels(video).transpose(1, 2).cpu())
    return list(torch.cat(parts, dim=1))


def videos(plan: Plan, stories: Sequence[Story], steps: int, seed: int) -> list[Tensor]:
    """A video of each story, uint8 [F, 3, H, W].

    Args:
        plan: a plan whose batch is the number of stories.
        stories: what to show; all are cut at the same places.
        steps: denoising passes of a chunk.
        seed: seed of the noise.
    """
    text = encoded(plan, stories)
    latents = streamed(open_runtime(plan), text, stories[0].opens, steps, seed)
    return decoded(plan, latents)


def scorers(workers: int) -> ProcessPoolExecutor:
    """A pool of so many processes that score, each with one thread."""
    return ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))


def scored(
    pool: Executor, films: Sequence[Tensor], stories: Sequence[Story]
) -> Callable[[], list[ShotScore]]:
    """Start to score every shot in a pool; calling the result waits for the scores."""
    jobs = [pool.submit(score_video, *pair) for pair in zip(films, stories, strict=True)]
    return lambda: [score for job in jobs for score in job.result()]


def lasting(pool: Executor, films: Sequence[Tensor]) -> Callable[[], Lasting]:
    """Start to read in a pool how long identity lasts; calling the result waits for it.

    Args:
        pool: processes that read.
        films: videos of one shot each, uint8 [F, 3, H, W]; equally long, at least 4 s.
    """
    jobs = [pool.submit(identity_over_time, film) for film in films]

    def result() -> Lasting:
        kept = [job.result() for job in jobs]
        early, late = [values[0] for values in kept], [fmean(values[-2:]) for values in kept]
        return Lasting(
            mean(early),
            mean(late),
            _mean([after - before for before, after in zip(early, late, strict=True)]),
            [fmean(values) for values in zip(*kept, strict=True)],
        )

    return result


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield each item only when the next one has been made.

    So a pool can work on an item while the next one is made.
    """
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting
