"""Measure a shot of many minutes of the tiny world, by absolute positions and by bounded ones.

    python benchmarks/endless.py --device cpu
    python benchmarks/endless.py --device cpu --videos 1 --minutes 2

The recipes make their chunks in turns, so that whatever else the machine does slows all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from lltk.bench.agreement import Interval, encoded, interval, mean
from lltk.bench.quality import STRETCH, draw_stories, streamed
from lltk.bench.record import Record, markdown, markdown_table, percentile, write_record
from lltk.bench.scorer import Reading, agreement, identity, read
from lltk.bench.script import script_options, script_parser, script_record
from lltk.graph.recipe import open_recipe
from lltk.models.tiny.world import FPS, STRIDE, Story
from lltk.stream.positions import largest_position
from lltk.stream.video import levels
from lltk.streaming import StreamPlan, open_decoder, open_runtime, plan_stream

_METHOD = """\
Videos of a single shot each, of captions that are drawn with a fixed seed and that no model was
trained on; 4 steps. Every two seconds are read by lltk/bench/scorer.py. Agreement: the share of a
minute's stretches whose shape, colour, motion and background are all as the caption has them.
Identity: how much of the size, the dot's colour and the background's tint of the first two seconds
a minute's stretches have kept. Both are in per cent, the mean over the videos with its 95 %
interval. Seconds a chunk are the transformer's wall time, passes and commit, for all videos at
once: the median and the 90th percentile of all chunks after the first minute. The recipes made
their chunks in turns."""
SEED = 30_000
MINUTE = 60 * FPS // STRETCH
"""Stretches of a minute."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument(
        "--recipes", nargs="+", default=["tiny_stream", "tiny_stream_bounded"], metavar="RECIPE"
    )
    made.add_argument("--videos", type=int, default=4, help="that are made at once (default: 4)")
    made.add_argument("--minutes", type=int, default=10, help="of each video (default: 10)")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return list(options.recipes)


def main() -> None:
    """Measure, and write the record."""
    options = script_options(parser())
    record = script_record("endless", _METHOD, results(options))
    write_record(options.output, record, text(record))


def text(record: Record) -> str:
    """The record as Markdown, with a table by minute."""
    table = markdown(
        record,
        "A shot of many minutes",
        {
            "recipe": lambda row: row["name"],
            "videos": lambda row: str(row["videos"]),
            "largest position": lambda row: f"{row['largest_position']:g}",
            "seconds a chunk": lambda row: f"{row['seconds']:.3f}",
            "90 % of chunks below": lambda row: f"{row['seconds_p90']:.3f}",
        },
    )
    parts = ("agreement", "identity")
    headings = [f"{row['name']}: {part} %" for row in record.results for part in parts]
    cells = zip(*(row[part] for row in record.results for part in parts), strict=True)
    lines = [[str(minute), *map(interval, row)] for minute, row in enumerate(cells, 1)]
    return "\n".join([table, *markdown_table(["minute", *headings], lines)]) + "\n"


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each recipe."""
    device = torch.device(options.device)
    size = f"geometry.batch={options.videos}"
    plans = [plan_stream(open_recipe(recipe, (size,)), device) for recipe in options.recipes]
    chunk = plans[0].geometry.chunk
    chunks = -(-(options.minutes * 60 * FPS + STRIDE - 1) // (STRIDE * chunk))
    stories = draw_stories(SEED, options.videos, 1, chunks, chunk)
    makers = [Maker(plan, stories) for plan in plans]
    for index in range(chunks):
        for maker in makers:
            maker.make()
        if index % 80 == 0:
            print(f"chunk {index} of {chunks}", flush=True)
    for recipe, plan, maker in zip(options.recipes, plans, makers, strict=True):
        bounded = largest_position(plan.geometry) if plan.transformer.turns_pages else None
        late = maker.seconds[60 * FPS // (STRIDE * chunk) :] or maker.seconds
        yield {
            "name": recipe,
            "videos": options.videos,
            "largest_position": chunks * chunk - 1 if bounded is None else bounded,
            "seconds": median(late),
            "seconds_p90": percentile(late, 0.9),
            "agreement": by_minute([watcher.shown for watcher in maker.watchers]),
            "identity": by_minute([watcher.kept for watcher in maker.watchers]),
        }


def by_minute(values: Sequence[Sequence[float]]) -> list[Interval]:
    """The mean over videos in each whole minute, from a percentage a video and stretch."""
    minutes = range(0, len(values[0]) - MINUTE + 1, MINUTE)
    return [mean([fmean(own[start : start + MINUTE]) for own in values]) for start in minutes]


class Maker:
    """Makes videos by a recipe, a chunk at a time, and watches them.

    Args:
        plan: whose batch is the number of stories.
        stories: what the videos show.
    """

    def __init__(self, plan: StreamPlan, stories: Sequence[Story]) -> None:
        text = encoded(plan, stories)
        self._latents = streamed(open_runtime(plan), text, stories[0].opens, 4, SEED)
        self._decoder = open_decoder(plan)
        self._device = plan.decoder_device
        self.watchers = [Watcher(story.shots[0].caption) for story in stories]
        self.seconds: list[float] = []
        """The transformer's, by chunk."""

    def make(self) -> None:
        """Make a chunk of every video."""
        begun = time.perf_counter()
        latents = next(self._latents)
        self.seconds.append(time.perf_counter() - begun)
        video = levels(self._decoder.decode(latents.to(self._device))).transpose(1, 2).cpu()
        for watcher, frames in zip(self.watchers, video, strict=True):
            watcher.see(frames)


class Watcher:
    """Reads a video's frames as they come, in stretches of two seconds.

    Args:
        caption: what the video should show.
    """

    def __init__(self, caption: str) -> None:
        self._caption = caption
        self._first: Reading | None = None
        self._waiting: list[Tensor] = []
        self.shown: list[float] = []
        """For each stretch, 100 where it shows all of the caption, else 0."""
        self.kept: list[float] = []
        """For each stretch, how much of the first one's identity it keeps, in per cent."""

    def see(self, frames: Tensor) -> None:
        """Take the frames that follow, uint8 [F, 3, H, W]."""
        self._waiting += frames
        while len(self._waiting) >= STRETCH:
            stretch = torch.stack(self._waiting[:STRETCH])
            del self._waiting[:STRETCH]
            found = read(stretch.float() / 127.5 - 1)
            self._first = self._first or found
            self.shown.append(100.0 * (agreement(found, self._caption).score == 100))
            self.kept.append(identity(self._first, found).score)


if __name__ == "__main__":
    main()
