"""What a stream's frames go to, and what stops it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from lltk.stream.script import ChunkPlan, Shot
from lltk.stream.video import VideoWriter, contact_sheet, pixels

_SHEET_COLUMNS = 6


def check_writable(paths: Iterable[Path]) -> None:
    """Refuse a file that cannot be written, before any work; makes missing folders.

    Raises:
        OSError: says which and why.
    """
    for path in paths:
        probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(13, "it is read-only")
            path.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"{path}: cannot be written ({error.strerror}); name another path"
            ) from error


class Frames:
    """A stream's sink: writes frames as they arrive, and keeps a contact sheet's.

    Args:
        writer: of the video.
        chunks: the stream's; a resumed one's are those still to be made.
        script: captions by shot, if they are known; for the contact sheet.
    """

    def __init__(self, writer: VideoWriter, chunks: Sequence[ChunkPlan]) -> None:
        self._writer = writer
        self._start = time.perf_counter()
        self._next = chunks[0].frames.start if chunks else 0
        self.count = 0
        self.first: float | None = None
        """Seconds from the making of this object to the first frame."""
        self._wanted: dict[int, int] = {}
        """The shot of each frame that a contact sheet shows."""
        for shot in dict.fromkeys(chunk.shot for chunk in chunks):
            own = [chunk.frames for chunk in chunks if chunk.shot == shot]
            at = torch.linspace(own[0].start, own[-1].stop - 1, _SHEET_COLUMNS).round().int()
            self._wanted |= dict.fromkeys(at.tolist(), shot)
        self._kept: dict[int, list[Tensor]] = {}

    def __call__(self, video: Tensor) -> None:
        frames = pixels(video)
        self._writer.write(frames)
        if self.first is None:
            self.first = time.perf_counter() - self._start
        for frame in frames:
            shot = self._wanted.get(self._next)
            if shot is not None:
                self._kept.setdefault(shot, []).append(frame)
            self._next += 1
        self.count += len(frames)

    def write_sheet(self, path: Path, captions: Mapping[int, str]) -> None:
        """Write a contact sheet of the shots that have frames, with their captions."""
        shots = [(captions[shot], torch.stack(kept)) for shot, kept in self._kept.items()]
        if shots:
            contact_sheet(path, shots, _SHEET_COLUMNS)


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Signals that ask to stop, Ctrl-C's and a kill's, as a list; the second one interrupts."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def captions_of(script: Sequence[Shot], chunks: Sequence[ChunkPlan]) -> dict[int, str]:
    """Each shot's caption; of a resumed stream, which has no script, each shot's last prompt."""
    if script:
        return {index: shot.caption for index, shot in enumerate(script)}
    return {chunk.shot: chunk.prompt for chunk in chunks}


def memory_used(device: torch.device) -> int:
    """Bytes: the most this process held so far, on a GPU in torch's tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return 0
