"""How well a stream recipe's videos of the tiny world show their captions, over many shots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
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
from lltk.graph.module import instantiate
from lltk.models.tiny.world import Story
from lltk.stream.script import SCENE_CUT
from lltk.stream.text import TextEncoder
from lltk.stream.video import levels
from lltk.streaming import StreamPlan, open_decoder

T = TypeVar("T")
Interval = tuple[float, float, float]
"""A value and its 95 % confidence limits, in per cent."""


@dataclass(frozen=True)
class Agreement:
    """What shots show.

    Attributes:
        shots: how many.
        agreement: share whose shape, colour, motion and background are all as the caption has them.
        later: how many follow a cut.
        after_cut: the same of these; None where there are none.
        parts: share that shows each part of the caption.
        identity: what the last two seconds share with the first two of it; None where every shot is
            shorter than four.
    """

    shots: int
    agreement: Interval
    later: int
    after_cut: Interval | None
    parts: dict[str, Interval]
    identity: Interval | None


@dataclass(frozen=True)
class Lasting:
    """Identity over the time of long single shots, per cent of what their first two seconds show.

    Attributes:
        early: in seconds 2 to 4.
        late: in the last four.
        change: from early to late, points, of the same shots.
        over_time: mean of the shots, every two seconds.
    """

    early: Interval
    late: Interval
    change: Interval
    over_time: list[float]


def summarise(scores: Sequence[ShotScore]) -> Agreement:
    """The scores of at least one shot."""
    later = [score for score in scores if score.index]
    kept = [score.kept for score in scores if not math.isnan(score.kept)]
    return Agreement(
        len(scores),
        share([all(score.right) for score in scores]),
        len(later),
        share([all(score.right) for score in later]) if later else None,
        {part: share([score.right[i] for score in scores]) for i, part in enumerate(PARTS)},
        mean(kept) if kept else None,
    )


def share(hits: Sequence[bool]) -> Interval:
    """How many are true, with Wilson's interval."""
    low, high = wilson(sum(hits), len(hits))
    return 100 * fmean(hits), 100 * low, 100 * high


def mean(values: Sequence[float]) -> Interval:
    """The mean of percentages with its interval; a single value has none."""
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
    """As text: ``93.3 (84.0 to 97.4)``."""
    return "–" if values is None else "{:.1f} ({:.1f} to {:.1f})".format(*values)


def encoded(plan: StreamPlan, stories: Sequence[Story]) -> Tensor:
    """The prompts of equally long stories, [B, N, S, E], on the transformer's device."""
    encoder = TextEncoder(plan.folder, plan.transformer.geometry.text_tokens, device=plan.device)
    texts = [prompt for story in stories for prompt in story.prompts(SCENE_CUT)]
    return encoder.encode(texts).unflatten(0, (len(stories), -1))


def decoded(plan: StreamPlan, latents: Iterator[Tensor]) -> list[Tensor]:
    """Videos, uint8 [F, 3, H, W] on the CPU, of latents that come chunk by chunk."""
    decoder = open_decoder(plan)
    parts = []
    for chunk in latents:
        video = decoder.decode(chunk.to(plan.decoder_device))
        parts.append(levels(video).transpose(1, 2).cpu())
    return list(torch.cat(parts, dim=1))


def videos(plan: StreamPlan, stories: Sequence[Story], steps: int, seed: int) -> list[Tensor]:
    """A video of each story, uint8 [F, 3, H, W]; they are cut at the same places.

    Args:
        plan: of as many videos at once as there are stories.
        stories: what to show.
        steps: denoising passes a chunk.
        seed: of the noise.
    """
    program = plan.transformer
    module = instantiate(program, plan.device)
    text = encoded(plan, stories)
    return decoded(plan, streamed(program, module, text, stories[0].opens, steps, seed))


def scored(
    pool: Executor, films: Sequence[Tensor], stories: Sequence[Story]
) -> Callable[[], list[ShotScore]]:
    """Have a pool of processes read every shot; the result waits for their scores."""
    jobs = [pool.submit(score_video, *pair) for pair in zip(films, stories, strict=True)]
    return lambda: [score for job in jobs for score in job.result()]


def lasting(pool: Executor, films: Sequence[Tensor]) -> Callable[[], Lasting]:
    """Have a pool of processes read how identity lasts; the result waits for them.

    Args:
        pool: of processes.
        films: videos of single shots, equally long, of at least 4 s, uint8 [F, 3, H, W].
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
    """Each item, once the one after it has been made: what a pool does for it goes on meanwhile."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting
