"""Video jobs: queued, made one at a time beside the live sessions, and kept as files."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from lltk import __version__
from lltk.files.reading import read_text
from lltk.files.writing import whole_file, write_text
from lltk.serve.admission import Full
from lltk.serve.engine import Engine
from lltk.serve.messages import Message
from lltk.serve.scheduling import Demand
from lltk.serve.settings import Limits
from lltk.serve.videos import Video, VideoError
from lltk.stream.forms import MP4S
from lltk.stream.image import read_image
from lltk.stream.report import ChunkReport
from lltk.stream.script import Shot
from lltk.stream.video import VideoWriter, pixels
from lltk.streaming import Models, Stream

_ID = re.compile(r"video_[0-9a-f]{32}")
_log = logging.getLogger(__name__)


class Job(Message):
    """A job, as its file has it.

    Attributes:
        video: what clients see.
        owner: the digest of the token that it belongs to.
        shots: what it shows.
        seed: of the noise; None for the recipe's.
        image: whether it has a first frame.
    """

    video: Video
    owner: str
    shots: tuple[Shot, ...]
    seed: int | None
    image: bool


class _Cancelled(Exception):
    """A job is deleted while it is made."""


@dataclass(eq=False)
class _Making:
    """A job that is made; see `lltk.serve.engine.Work`."""

    stream: Stream
    fps: float
    chunks: int
    changed: Callable[[], object]
    made: int = 0
    failure: Exception | None = None

    @property
    def over(self) -> bool:
        return self.failure is not None or self.made >= self.chunks

    def demand(self) -> Demand | None:
        return None if self.over else Demand(0.0, 0.0)

    @property
    def ready(self) -> bool:
        return self.stream.ready

    def make(self) -> ChunkReport | None:
        report = self.stream.make()
        self.made += report is not None
        self.changed()
        return report

    def fail(self, error: Exception) -> None:
        self.failure = error
        self.changed()


@dataclass(eq=False)
class _Sink:
    """Writes a video's frames, and its first one as a thumbnail."""

    writer: VideoWriter
    thumbnail: Path
    begun: bool = field(default=False)

    def __call__(self, video: Tensor) -> None:
        frames = pixels(video)
        if not self.begun:
            with whole_file(self.thumbnail) as file:
                Image.fromarray(frames[0].numpy()).save(cast(IO[bytes], file), "WEBP")
            self.begun = True
        self.writer.write(frames)


class Jobs:
    """The jobs of a server, in a folder. For the event loop's thread.

    Args:
        models: loaded.
        name: of the model, for clients.
        limits: of the server.
        engine: makes the chunks, when no live session needs it.
        folder: for the jobs alone; made if it is not there.
    """

    def __init__(
        self, models: Models, name: str, limits: Limits, engine: Engine, folder: Path
    ) -> None:
        self._models = models
        self._name = name
        self._limits = limits
        self._engine = engine
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._jobs: dict[str, Job] = {job.video.id: job for job in self._read()}
        self._waiting = deque(
            id for id, job in self._jobs.items() if job.video.status in ("queued", "in_progress")
        )
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._current: str | None = None

    def __len__(self) -> int:
        """How many wait, or are made."""
        return len(self._waiting) + (self._current is not None)

    # What clients ask for

    def create(
        self, owner: str, shots: tuple[Shot, ...], seed: int | None, image: Tensor | None
    ) -> Video:
        """Queue a job.

        Raises:
            Full: as many wait as may.
            ValueError: it is longer than a video may be.
        """
        chunking = self._models.plan.chunking
        frames = sum(length.frames for length in chunking.lengths(shots))
        if frames > self._limits.seconds * chunking.fps:
            raise ValueError(
                f"seconds: {frames / chunking.fps:.1f} s in whole chunks; make it at most "
                f"{self._limits.seconds:g}"
            )
        if len(self._waiting) >= self._limits.jobs:
            raise Full(f"videos: {len(self._waiting)} wait already; come back later", 30.0)
        height, width = self._models.plan.size
        video = Video(
            id=f"video_{secrets.token_hex(16)}",
            model=self._name,
            prompt="\n".join(shot.caption for shot in shots),
            seconds=f"{frames / chunking.fps:g}",
            size=f"{width}x{height}",
            created_at=int(time.time()),
        )
        job = Job(video=video, owner=owner, shots=shots, seed=seed, image=image is not None)
        if image is not None:
            levels = ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0)
            with whole_file(self._file(video.id, ".png")) as file:
                Image.fromarray(levels.numpy()).save(cast(IO[bytes], file), "PNG")
        self._keep(job)
        self._waiting.append(video.id)
        self._changed.set()
        return video

    def of(self, owner: str) -> list[Video]:
        """An owner's jobs, oldest first."""
        return [job.video for job in self._jobs.values() if job.owner == owner]

    def find(self, owner: str, id: str) -> Video | None:
        """A job; None if the owner has none of this id."""
        job = self._jobs.get(id)
        return job.video if job is not None and job.owner == owner else None

    def content(self, id: str, thumbnail: bool) -> Path:
        """The file of a job that is completed."""
        return self._file(id, ".webp" if thumbnail else ".mp4")

    def delete(self, owner: str, id: str) -> bool:
        """Forget a job, also while it is made; whether there was one."""
        if self.find(owner, id) is None:
            return False
        self._forget(id)
        self._changed.set()
        return True

    # Making them

    async def run(self) -> None:
        """Make the jobs, one after another, until it is cancelled."""
        while True:
            while self._waiting:
                self._current = id = self._waiting.popleft()
                if id in self._jobs:
                    await self._make(self._jobs[id])
                self._current = None
            self._changed.clear()
            await self._changed.wait()

    async def _make(self, job: Job) -> None:
        id = job.video.id
        self._note(id, status="in_progress", progress=0)
        try:
            await self._stream(job)
        except _Cancelled:
            self._remove_files(id)
        except (ValueError, OSError, RuntimeError) as error:
            _log.exception("%s failed", id)
            said = str(error) if isinstance(error, ValueError) else "the server's log says why"
            self._note(id, status="failed", error=VideoError(code="failed", message=said))
        else:
            self._note(id, status="completed", progress=100, completed_at=int(time.time()))
            self._make_room()

    async def _stream(self, job: Job) -> None:
        """Make a job's video.

        Raises:
            _Cancelled: it was deleted meanwhile.
            ValueError, OSError, RuntimeError: the chunks or the file cannot be made.
        """
        id, plan = job.video.id, self._models.plan
        chunks = sum(length.chunks for length in plan.chunking.lengths(job.shots))
        about = {
            "model": self._name,
            "seed": plan.section.seed if job.seed is None else job.seed,
            "shots": [shot.model_dump() for shot in job.shots],
            "lltk": __version__,
        }
        writer = await asyncio.to_thread(
            VideoWriter,
            self._file(id, ".mp4"),
            *plan.size,
            plan.section.fps,
            plan.writer_threads,
            json.dumps(about, ensure_ascii=False),
            MP4S[plan.section.serve.codec],
        )
        try:
            image = None
            if job.image:
                image, _ = await asyncio.to_thread(read_image, self._file(id, ".png"), *plan.size)
            sink = _Sink(writer, self._file(id, ".webp"))
            stream = await asyncio.to_thread(
                partial(self._models.open, sink, job.shots, image=image, seed=job.seed)
            )
            wake = partial(self._loop.call_soon_threadsafe, self._changed.set)
            making = _Making(stream, plan.section.fps, chunks, wake)
            await asyncio.to_thread(stream.__enter__)
            ended: BaseException | None = None
            try:
                self._engine.add(making)
                while not making.over and id in self._jobs:
                    self._changed.clear()
                    self._note(id, progress=100 * making.made // (chunks + 1))
                    await self._changed.wait()
                ended = making.failure if id in self._jobs else _Cancelled()
            except asyncio.CancelledError as error:
                ended = error
                raise
            finally:
                await asyncio.to_thread(self._engine.remove, making)
                kind = None if ended is None else type(ended)
                await asyncio.to_thread(stream.__exit__, kind, ended, None)
        finally:
            await asyncio.to_thread(writer.close)
        if ended is not None:
            raise ended

    # Their files

    def _file(self, id: str, suffix: str) -> Path:
        assert _ID.fullmatch(id)
        return self._folder / f"{id}{suffix}"

    def _note(self, id: str, **changes: Any) -> None:
        """Change what clients see of a job, unless it was deleted meanwhile."""
        if (job := self._jobs.get(id)) is None:
            return
        changed = job.model_copy(update={"video": job.video.model_copy(update=changes)})
        if "status" in changes:
            self._keep(changed)
        self._jobs[id] = changed

    def _keep(self, job: Job) -> None:
        self._jobs[job.video.id] = job
        write_text(self._file(job.video.id, ".json"), job.model_dump_json())

    def _forget(self, id: str) -> None:
        del self._jobs[id]
        if id in self._waiting:
            self._waiting.remove(id)
        self._remove_files(id)

    def _remove_files(self, id: str) -> None:
        for suffix in (".json", ".mp4", ".webp", ".png"):
            self._file(id, suffix).unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Forget the oldest jobs beyond those that are kept."""
        over = [id for id, job in self._jobs.items() if job.video.status in ("completed", "failed")]
        for id in over[: max(len(over) - self._limits.finished, 0)]:
            self._forget(id)

    def _read(self) -> list[Job]:
        """The jobs in the folder, oldest first."""
        jobs = []
        for file in self._folder.glob("video_*.json"):
            try:
                jobs.append(Job.model_validate_json(read_text(file)))
            except (ValidationError, ValueError) as error:
                raise ValueError(f"{file}: is no job of this lltk ({error}); remove it") from error
        return sorted(jobs, key=lambda job: job.video.created_at)
