"""A stream to its files, until it ends or is stopped."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lltk.cli.outputs import Frames, Tally, captions_of, memory_used, unwritten
from lltk.cli.stopping import stopping
from lltk.files.outputs import Output
from lltk.graph.memory import available, readable, total
from lltk.parallel.ranks import Ranks
from lltk.stream.frame_folder import FRAMES
from lltk.stream.image import read_image
from lltk.stream.script import Shot
from lltk.stream.state import STATE
from lltk.stream.video import CONTACT_SHEET, VIDEO
from lltk.streaming import Plan, open_stream, stream_memory
from lltk.streaming.stream import own_file


@dataclass(frozen=True)
class Files:
    """The files that ``lltk stream`` was given.

    Attributes:
        script: what to show.
        output: the video to write; None where nothing is made.
        sheet: the contact sheet to write.
        image: the video's first frame.
        save: where to keep the state in the end.
        resume: a state to go on from.
    """

    script: Path | None
    output: Path | None
    sheet: Path | None
    image: Path | None
    save: Path | None
    resume: Path | None

    @property
    def state(self) -> Path | None:
        """Where the state is kept: where it was asked for, or beside the video."""
        beside = None if self.output is None else self.output.with_suffix(".state.safetensors")
        return self.save or beside

    def outputs(self, ranks: int) -> list[Output]:
        """What is written, or may be.

        Args:
            ranks: processes, each of which keeps a state.
        """
        video = VIDEO if self.output is None or self.output.suffix else FRAMES
        named = ((self.output, video), (self.sheet, CONTACT_SHEET))
        states = [] if self.state is None else [own_file(self.state, r) for r in range(ranks)]
        return [
            *(Output(path, kind) for path, kind in named if path is not None),
            *(Output(path, STATE) for path in states),
        ]

    def inputs(self, ranks: int) -> list[Path]:
        """What is read; argument as `outputs`'."""
        states = [] if self.resume is None else [own_file(self.resume, r) for r in range(ranks)]
        return [*states, *(file for file in (self.script, self.image) if file is not None)]


def unused(path: Path) -> Path:
    """The path, or the first like it, with a number behind its name, that is not there yet."""
    numbered = (path.with_stem(f"{path.stem}_{number}") for number in count(2))
    return next(each for each in chain([path], numbered) if not each.exists())


def stream_to_files(
    console: Console,
    ranks: Ranks,
    plan: Plan,
    shots: Sequence[Shot],
    files: Files,
    again: Sequence[str],
) -> dict[str, Any]:
    """Stream to the files; returns what it did, as plain data.

    Of several ranks the first writes the files. All stop after the same chunk.

    Args:
        console: for progress.
        ranks: the processes that run the stream.
        plan: of the stream.
        shots: to show; none where a state is resumed.
        files: to read and write.
        again: the command without its files, for the message on how to go on.

    Raises:
        click.ClickException: it was stopped, or a file cannot be written; says how to go on.
        ValueError: see `open_stream` and `Stream.__next__`.
    """
    output, state, first = files.output, files.state, None
    assert output is not None and state is not None
    if files.image is not None:
        first, note = read_image(files.image, *plan.size)
        if note is not None:
            console.print(note)
    frames = Frames(output, plan.size, plan.section.fps, plan.writer_threads)
    for where, owners in stream_memory(plan).items():
        free = readable(available(torch.device(where)))
        console.print(f"memory: {readable(total(owners))} on {where}, of {free} free")
    begun = time.perf_counter()
    with console.status("encoding prompts, loading models"):
        sink = frames if ranks.rank == 0 else None
        stream = open_stream(plan, sink, shots, image=first, resume=files.resume)
    chunks, delivery = stream.session.timeline.chunks, stream.session.delivery
    start = delivery.frame
    if not chunks and not ranks.any(bool(delivery.undelivered)):
        raise ValueError(f"--resume: {files.resume}: its script is over; nothing is left to make")
    if files.resume is not None:
        console.print(f"going on at frame {start}; the new file holds the continuation")
    frames.expect(start, chunks, files.sheet is not None)
    captions = captions_of(shots, chunks)
    loaded = time.perf_counter()
    tally = Tally(loaded)
    failure: OSError | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        stopping() as stop,
        nullcontext() if sink is None else sink,
        stream,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        bar = progress.add_task("", total=len(chunks))
        try:
            for report in stream:
                tally.add(report)
                used = readable(memory_used(plan.device))
                held = f"{report.pages + 1} of {plan.geometry.pages} pages"
                text = f"{tally.rate(frames.count):.1f} fps, {held}, {used}"
                progress.update(bar, advance=1, description=text)
                if ranks.any(stop.asked):
                    break
            stream.close()
        except OSError as error:
            if ranks.size > 1:
                raise  # the other ranks wait within a chunk
            failure = error
        done = time.perf_counter()
        left = len(stream.session.timeline.chunks)
        stopped = failure is not None or left > 0
        if stopped or files.save is not None:
            try:
                with stop.keeping():
                    stream.save(state)
            except OSError as error:
                what = str(failure or f"{output} plays, {frames.count} frames")
                raise click.ClickException(
                    f"{what}; the state is not kept: {error}; stream again, with --save to "
                    "another disk"
                ) from error
        ranks.any(False)  # all have saved
        if stopped and ranks.rank == 0:
            following = output.with_name(f"{output.stem}_rest{output.suffix}")
            resumed = shlex.join([*again, "--resume", str(state), "-o", str(following)])
            what = str(failure) if failure else f"stopped: {output} plays, {frames.count} frames"
            unshown = unwritten(frames, files.sheet, captions)
            raise click.ClickException(
                f"{what}{unshown}; {left} chunks are left, go on with: {resumed}"
            )
    if unshown := unwritten(frames, files.sheet, captions):
        raise click.ClickException(f"{output} plays, {frames.count} frames{unshown}")
    return tally.result(frames, done, plan.section.fps) | {
        "output": str(output),
        "state": None if files.save is None else str(files.save),
        "load_seconds": loaded - begun,
        "memory_bytes": memory_used(plan.device),
    }
