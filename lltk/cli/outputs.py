"""What a stream's frames go to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lltk.graph.memory import readable
from lltk.stream.chunks import Chunk
from lltk.stream.frame_folder import open_writer
from lltk.stream.report import ChunkReport
from lltk.stream.script import Shot
from lltk.stream.video import contact_sheet, pixels

_SHEET_COLUMNS = 6


def share_cores(device: torch.device) -> None:
    """On a CPU, give half of the cores to the transformer's thread and half to the decoder's.

    If each used all cores, each would wait for the other at every op.
    """
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))


class Frames:
    """A stream's sink: writes frames as they arrive, and keeps some for a contact sheet.

    A context manager; the file begins with the block and is whole after it.

    Args:
        path: of the video.
        size: its height and width.
        fps: frames a second.
        threads: of the video's encoder.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float, threads: int) -> None:
        self._open = partial(open_writer, path, *size, fps, threads)
        self._wanted: dict[int, int] = {}
        self._kept: dict[int, list[Tensor]] = {}
        self._next = 0
        self._opening = 0
        self.count = 0
        """Frames written."""
        self.first: float | None = None
        """When the first frame was written, by `time.perf_counter`."""
        self.warm: tuple[int, float] | None = None
        """Frames of the first chunk, and when they were written."""

    def expect(self, first: int, chunks: Sequence[Chunk], sheet: bool) -> None:
        """Say which frames will arrive.

        Args:
            first: the first frame, in or before the chunks.
            chunks: to come.
            sheet: whether to keep a contact sheet's frames as they pass.
        """
        for shot in dict.fromkeys(chunk.shot for chunk in chunks if sheet):
            own = [chunk.frames for chunk in chunks if chunk.shot == shot]
            at = torch.linspace(own[0].start, own[-1].stop - 1, _SHEET_COLUMNS).round().int()
            self._wanted |= dict.fromkeys(at.tolist(), shot)
        self._next = first
        self._opening = chunks[0].frames.stop - first if chunks else 0

    def __call__(self, video: Tensor) -> None:
        frames = pixels(video)
        self._writer.write(frames)
        if self.first is None:
            self.first = time.perf_counter()
        for frame in frames:
            shot = self._wanted.get(self._next)
            if shot is not None:
                self._kept.setdefault(shot, []).append(frame.clone())
            self._next += 1
        self.count += len(frames)
        if self.warm is None and self.count >= self._opening:
            self.warm = self.count, time.perf_counter()

    def write_sheet(self, path: Path, captions: Mapping[int, str]) -> None:
        """Write a contact sheet of the shots that have frames."""
        shots = [(captions[shot], torch.stack(kept)) for shot, kept in self._kept.items()]
        if shots:
            contact_sheet(path, shots, _SHEET_COLUMNS)

    def __enter__(self) -> Frames:
        self._writer = self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()


def unwritten(frames: Frames, sheet: Path | None, captions: Mapping[int, str]) -> str:
    """Write the contact sheet, if one is wanted; gives what to say if that fails, else nothing."""
    if sheet is None:
        return ""
    try:
        frames.write_sheet(sheet, captions)
    except OSError as error:
        return f"; the contact sheet is not written: {error}"
    return ""


class Tally:
    """Adds up what a stream's chunks took.

    Args:
        start: when the first chunk began, by `time.perf_counter`.
    """

    def __init__(self, start: float) -> None:
        self._start = start
        self._seconds = dict.fromkeys(("transformer", "decoder", "text", "outside"), 0.0)
        self._chunks = 0

    def add(self, report: ChunkReport) -> None:
        """Note a chunk."""
        self._chunks += 1
        self._seconds["transformer"] += sum(report.graphs.values())
        self._seconds["decoder"] += report.decoding["decode"]
        self._seconds["text"] += report.text
        self._seconds["outside"] += report.outside

    def rate(self, frames: int) -> float:
        """Frames a second so far."""
        return frames / (time.perf_counter() - self._start)

    def result(self, frames: Frames, done: float, fps: float) -> dict[str, Any]:
        """What the stream did, as plain data; times in seconds."""
        wall = done - self._start
        steady = None
        if frames.warm is not None and frames.count > frames.warm[0]:
            steady = (frames.count - frames.warm[0]) / (done - frames.warm[1])
        return {
            "chunks": self._chunks,
            "frames": frames.count,
            "video_seconds": frames.count / fps,
            "wall_seconds": wall,
            "e2e_fps": frames.count / wall,
            "e2e_fps_after_first_chunk": steady,
            "first_frame_seconds": None if frames.first is None else frames.first - self._start,
            "share_of_wall": {part: took / wall for part, took in self._seconds.items()},
        }


def summary(result: Mapping[str, Any]) -> dict[str, str]:
    """A result of `Tally`, with what the command adds to it, for people to read."""
    steady, shares = result["e2e_fps_after_first_chunk"], result["share_of_wall"]
    lines = {
        "frames": f"{result['frames']} ({result['video_seconds']:.2f} s)",
        "E2E FPS, prompts encoded to frames written": f"{result['e2e_fps']:.1f}",
        "first frame": f"{result['first_frame_seconds']:.2f} s",
        "text encoder and loading, before": f"{result['load_seconds']:.1f} s",
        "most memory": readable(result["memory_bytes"]),
    }
    if steady is not None:
        lines["E2E FPS after the first chunk"] = f"{steady:.1f}"
    for part, share in shares.items():
        lines[f"share of the time (they overlap): {part}"] = f"{share:.0%}"
    if result["state"] is not None:
        lines["state"] = result["state"]
    return lines


def captions_of(script: Sequence[Shot], chunks: Sequence[Chunk]) -> dict[int, str]:
    """Each shot's caption. A resumed stream has no script: then each shot's last prompt."""
    if script:
        return {index: shot.caption for index, shot in enumerate(script)}
    return {chunk.shot: chunk.prompt for chunk in chunks}


def memory_used(device: torch.device) -> int:
    """The most bytes that this process has held so far; on a GPU, in torch's tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return 0
