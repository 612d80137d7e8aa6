"""How fast a recipe streams, from text to a video file."""

from __future__ import annotations

import resource
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lltk.bench.record import Record, digest, markdown, markdown_table, percentile
from lltk.graph.memory import readable
from lltk.stream.report import ChunkReport
from lltk.stream.script import Shot
from lltk.stream.video import VideoWriter, pixels
from lltk.streaming import Plan, describe, open_stream, stream_memory

METHOD = (
    "Streamed to an MP4 file; before that, models are loaded and prompts encoded. Each run is a "
    "session of its own. Its first chunks warm up and count only in the first-frame latency, which "
    "is the time from the beginning of the first chunk until its first frame is written. DiT FPS: "
    "frames over seconds in the step and commit graphs. Decode FPS: frames over seconds in the "
    "decoder's graphs, which overlap with the next chunk. E2E FPS: frames over wall time, from the "
    "end of the warm-up, whose last frames may still be in the making, to the file's end. E2E "
    "seconds: until so many seconds of video are written. Latency: from the beginning of a chunk "
    "until its first frame is written; a prompt that is switched is seen after that time at the "
    "soonest, and a chunk's seconds later at the latest. Outside: the share of a chunk's time "
    "that the session's thread spends neither in the model's graphs nor in the text encoder nor "
    "waiting for the decoder, plus what another thread takes to write the frames. A chunk's "
    "seconds by part are means; those of other threads, decode and deliver, overlap with the "
    "rest. FPS and latencies are medians of the runs; p50 and p90 are over all measured chunks."
)
_CAPTIONS = ("A red square moves to the right.", "A blue circle moves up.")
_LENGTHS = (16, 32, 64)
"""Lengths in seconds of video whose E2E time is recorded, if as much is measured."""
_SHOT = 5.0
"""The longest shot, in seconds."""


@dataclass(frozen=True)
class Timings:
    """What one run took. Times are in seconds, all by one clock.

    Attributes:
        loading: the time from the plan to a session that can run, with prompts encoded.
        begun: when the first chunk began.
        first: when the first frame was written.
        warm: when the warm-up ended.
        ended: when the file was finished.
        frames: frames written from ``warm`` to ``ended``; some may be the warm-up's last.
        every: frames written in all.
        decoding: the time in the decoder's graphs from ``warm`` to ``ended``.
        reports: reports of the chunks after the warm-up, without their latents.
        marks: pairs: how many frames of these chunks were written by when.
        starts: when each of these chunks began.
    """

    loading: float
    begun: float
    first: float
    warm: float
    ended: float
    frames: int
    every: int
    decoding: float
    reports: Sequence[ChunkReport]
    marks: Sequence[tuple[int, float]]
    starts: Sequence[float]

    @property
    def latencies(self) -> list[float]:
        """For each chunk, the seconds from its beginning until its first frame was written."""
        before = accumulate((len(report.chunk.frames) for report in self.reports), initial=0)
        return [
            next(at for count, at in self.marks if count > frames) - start
            for start, frames in zip(self.starts, before, strict=False)
        ]


def measure(
    plan: Plan,
    seconds: float,
    warm_up: int,
    runs: int,
    prompts: Callable[[str], Tensor] | None = None,
    in_turn: bool = False,
) -> dict[str, Any]:
    """Stream shots of at most 5 s and record how that went.

    Args:
        plan: a plan with weights.
        seconds: how much video is measured, rounded to whole chunks.
        warm_up: how many chunks come before it.
        runs: how often it is streamed.
        prompts: embeddings in place of the text encoder's; see `open_stream`.
        in_turn: whether each chunk waits for the frames of the one before.

    Returns:
        A result for a `Record`: what `summary` returns, and what ran. Ranks but the first return
        nothing.
    """
    script = _script(plan, seconds, warm_up)
    if plan.rank != 0:
        for _ in range(runs):
            with open_stream(plan, None, script, prompts=prompts) as stream:
                deque(stream, maxlen=0)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        timings = [_timed(plan, script, path, warm_up, prompts, in_turn) for _ in range(runs)]
    section = plan.section
    return {
        "recipe": digest(plan.recipe.resolved()),
        "ran": describe(plan),
        "implementations": dict(plan.implementations),
        "text": {"device": "random" if prompts else str(plan.text_device), "counted": False},
        "steps": section.steps,
        "in_turn": in_turn,
        "runs": runs,
        "warm_up": {
            "chunks": warm_up,
            "loading_seconds": median(t.loading for t in timings),
            "seconds": median(t.warm - t.begun for t in timings),
        },
        **summary(timings, section.fps),
        "memory": {"planned": stream_memory(plan), "peak": _peak()},
    }


def summary(timings: Sequence[Timings], fps: float) -> dict[str, Any]:
    """What runs took together: FPS, seconds, and shares in [0, 1]. ``fps`` is the video's."""

    def transformed(report: ChunkReport) -> float:
        return report.graphs["step"] + report.graphs["commit"]

    def frames(each: Timings) -> int:
        return sum(len(report.chunk.frames) for report in each.reports)

    def until(each: Timings, seconds: int) -> float:
        return next(at for count, at in each.marks if count >= seconds * fps) - each.warm

    long = [seconds for seconds in _LENGTHS if seconds * fps <= min(map(frames, timings))]
    reports = [report for each in timings for report in each.reports]
    taken = [report.seconds for report in reports]
    latencies = [latency for each in timings for latency in each.latencies]
    return {
        "chunks": len(reports),
        "frames": sum(map(frames, timings)),
        "dit_fps": median(
            frames(each) / sum(transformed(report) for report in each.reports) for each in timings
        ),
        "decode_fps": median(each.frames / each.decoding for each in timings),
        "e2e_fps": median(frames(each) / (each.ended - each.warm) for each in timings),
        "e2e_seconds": {str(n): median(until(each, n) for each in timings) for n in long},
        "all_fps": median(
            each.every / (each.loading + each.ended - each.begun) for each in timings
        ),
        "first_frame_seconds": median(each.first - each.begun for each in timings),
        "chunk_seconds": _percentiles(taken),
        "latency_seconds": _percentiles(latencies),
        "chunk_parts": _parts(reports),
        "outside_share": sum(r.outside + r.decoding["deliver"] for r in reports) / sum(taken),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {"p50": percentile(values, 0.5), "p90": percentile(values, 0.9)}


def _parts(reports: Sequence[ChunkReport]) -> dict[str, float]:
    """Mean seconds of a chunk by what they were spent on."""
    parts = [
        {"text": r.text, **r.graphs, "waiting": r.waited, "outside": r.outside, **r.decoding}
        for r in reports
    ]
    names = {name: None for each in parts for name in each}
    return {name: sum(each.get(name, 0.0) for each in parts) / len(parts) for name in names}


def text(record: Record) -> str:
    """The record as Markdown: the rates and times, what ran, and memory by owner."""
    lines = [
        markdown(
            record,
            "Streaming",
            {
                "recipe": lambda result: result["name"],
                "DiT FPS": lambda result: f"{result['dit_fps']:.1f}",
                "decode FPS": lambda result: f"{result['decode_fps']:.1f}",
                "E2E FPS": lambda result: f"{result['e2e_fps']:.1f}",
                "first frame s": lambda result: f"{result['first_frame_seconds']:.2f}",
                "chunk p50 s": lambda result: f"{result['chunk_seconds']['p50']:.3f}",
                "chunk p90 s": lambda result: f"{result['chunk_seconds']['p90']:.3f}",
                "latency p50 s": latency,
                "outside": lambda result: f"{result['outside_share']:.1%}",
                "peak memory": lambda result: ", ".join(
                    f"{owner} {readable(size)}" for owner, size in result["memory"]["peak"].items()
                ),
            },
        )
    ]
    for result in record.results:
        lines += [f"## {result['name']}", "", *_details(result), ""]
    return "\n".join(lines)


def latency(result: Mapping[str, Any]) -> str:
    """The median of a result's latencies in seconds; a dash where a record has none."""
    found = result.get("latency_seconds")
    return f"{found['p50']:.2f}" if found else "–"


def _details(result: Mapping[str, Any]) -> list[str]:
    warm_up, encoder = result["warm_up"], result["text"]
    counted = "counted" if encoder["counted"] else "not counted"
    said = f"text encoded on {encoder['device']}, before the stream, {counted} in these; with it"
    if encoder["device"] == "random":
        said = "random embeddings in place of text; with them"
    planned = [
        [device, owner, readable(size)]
        for device, owners in result["memory"]["planned"].items()
        for owner, size in owners.items()
    ]
    return [
        f"- {result['runs']} runs, {result['chunks']} chunks ({result['frames']} frames) measured "
        f"after {warm_up['chunks']} chunks of warm-up a run ({warm_up['seconds']:.2f} s), "
        f"{warm_up['loading_seconds']:.1f} s of loading before",
        f"- {said}, all loading and the warm-up: {result['all_fps']:.1f} FPS",
        *(f"- {part}: {what}" for part, what in result["ran"].items()),
        f"- resolved recipe: {result['recipe']}",
        "",
        *markdown_table(["device", "planned for", "size"], planned),
    ]


def _script(plan: Plan, seconds: float, warm_up: int) -> list[Shot]:
    """Shots of whole chunks; the last one may be shorter."""
    geometry, stride = plan.geometry, plan.spec.stride[0]
    chunk = stride * geometry.chunk / plan.section.fps
    left, most = warm_up + max(1, round(seconds / chunk)), max(1, int(_SHOT / chunk))
    shots: list[Shot] = []
    while left:
        took = min(left, most)
        caption = _CAPTIONS[len(shots) % len(_CAPTIONS)]
        shots.append(Shot(caption=caption, seconds=took * chunk, cut=True))
        left -= took
    return shots


def _timed(
    plan: Plan,
    script: Sequence[Shot],
    path: Path,
    warm_up: int,
    prompts: Callable[[str], Tensor] | None,
    in_turn: bool,
) -> Timings:
    written = 0
    reports: list[ChunkReport] = []
    marks: list[tuple[int, float]] = []
    start = time.perf_counter()

    def sink(video: Tensor) -> None:
        nonlocal written
        frames = pixels(video)
        writer.write(frames)
        written += len(frames)
        marks.append((written, time.perf_counter()))

    with (
        VideoWriter(path, *plan.size, plan.section.fps, plan.writer_threads) as writer,
        open_stream(plan, sink, script, prompts=prompts) as stream,
    ):
        begun = warm = time.perf_counter()
        warmed, before, decoded = 0, 0, 0.0
        starts = [begun]
        for index, report in enumerate(stream, 1):
            if in_turn:
                stream.session.delivery.rest()
            if index <= warm_up:
                warmed += len(report.chunk.frames)
            else:
                reports.append(replace(report, latents=torch.empty(0)))  # or memory would grow
            if index == warm_up:
                before, warm = written, time.perf_counter()
                decoded = stream.session.delivery.seconds["decode"]
            starts.append(time.perf_counter())
    ended = time.perf_counter()
    decoding = stream.session.delivery.seconds["decode"] - decoded
    loading, frames = begun - start, written - before
    first, marks = marks[0][1], [(count - warmed, at) for count, at in marks]
    return Timings(
        loading, begun, first, warm, ended, frames, written, decoding, reports, marks,
        starts[warm_up:-1],
    )  # fmt: skip


def _peak() -> dict[str, int]:
    """The most bytes that were held: by this process in main memory, and by torch on each GPU."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    for index in range(torch.cuda.device_count()):
        peak[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peak
