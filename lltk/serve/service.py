"""All that a server has: models, engine, sessions and jobs, from its start to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lltk.serve.engine import Engine, Work
from lltk.serve.images import Images
from lltk.serve.jobs import Jobs
from lltk.serve.messages import SHOT_SECONDS, ImageReference, SessionStart
from lltk.serve.metrics import STATES, Metrics
from lltk.serve.saved import Saved
from lltk.serve.scheduling import Capacity
from lltk.serve.sessions import Entry, Sessions, Tell
from lltk.serve.settings import Limits
from lltk.stream.fragments import FragmentWriter
from lltk.stream.report import ChunkReport
from lltk.stream.script import single_shot
from lltk.streaming import LeadingModels, Models, Orders, Plan, load_models

_WARM_UP = "a red circle moving right"
"""Any prompt does."""


class Service:
    """A server's parts. `start` returns at once; `sessions` is there when it is `ready`.

    Args:
        plan: of the streams, with weights.
        name: of the model, for clients.
        limits: of the server.
        folder: of this server alone, where it keeps sessions and videos.
        orders: to the other ranks, where several run the models.

    Raises:
        ValueError: there is no encoder for the video.
    """

    def __init__(
        self, plan: Plan, name: str, limits: Limits, folder: Path, orders: Orders | None = None
    ) -> None:
        codec = plan.section.serve.codec
        encode = FragmentWriter(lambda data: None, *plan.size, plan.section.fps, codec)
        encode.close()  # it raises where there is no encoder
        self.plan = plan
        self.name = name
        self.started = int(time.time())
        """Seconds since 1970."""
        self.limits = limits
        self.capacity = Capacity()
        self.metrics = Metrics()
        self.images = Images(limits, plan.size)
        self._folder = folder
        self._orders = orders
        self._saved = Saved(folder / "sessions")
        self.failure: BaseException | None = None
        """Why it can make nothing: the models cannot be loaded, or the device has failed."""
        self.failed: Callable[[], object] = lambda: None
        """Called, in any thread, once there is a failure."""
        self._sessions: Sessions | None = None
        self._jobs: Jobs | None = None
        self._engine: Engine | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether sessions can be opened."""
        return self._sessions is not None

    @property
    def sessions(self) -> Sessions:
        """The live sessions; ask when it is ready."""
        assert self._sessions is not None
        return self._sessions

    @property
    def jobs(self) -> Jobs:
        """The video jobs; ask when it is ready."""
        assert self._jobs is not None
        return self._jobs

    @property
    def engine(self) -> Engine:
        """Makes the chunks; ask when it is ready."""
        assert self._engine is not None
        return self._engine

    async def start(self) -> None:
        """Begin to load the models."""
        self._begin_task(self._load())

    async def close(self) -> None:
        """Keep every session on disk, and let go of the models.

        After a failure no session is kept: nobody knows what the device holds.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._sessions is not None and self.failure is None:
            await self._sessions.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        self._tasks.clear()
        self._sessions = self._jobs = self._engine = None  # FastAPI remembers routes for ever

    def stop(self) -> None:
        """Make no more chunks; for a server that ends without `close`."""
        if self._engine is not None:
            self._engine.stop()

    def _begin_task(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it until the server ends; what it raises ends the server."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._task_ended)
        self._tasks.append(task)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.failed()

    async def begin(self, owner: str, message: SessionStart, tell: Tell) -> tuple[Entry, str]:
        """Open the session that a message asks for; see `Sessions.start`.

        Raises:
            Full: there is no room, and none to wait in.
            ValueError: it asks for what is not served.
        """
        shots = message.shots or single_shot(message.prompt or "", SHOT_SECONDS)
        image = await self.check(owner, message.model, message.size, message.image_reference)
        return await self.sessions.start(
            owner,
            shots,
            tell,
            image=image,
            seed=message.seed,
            recache=message.recache,
            seconds=message.max_seconds,
        )

    async def check(
        self, owner: str, model: str | None, size: str | None, image: ImageReference | None
    ) -> Tensor | None:
        """The first frame of what an owner asks for: float32 [1, 3, H, W] in [-1, 1].

        Raises:
            ValueError: it is another model or another size than is served, or no image.
        """
        height, width = self.plan.size
        if model not in (None, self.name):
            raise ValueError(f"model: {model} is not served; name {self.name}, or none")
        if size not in (None, f"{width}x{height}"):
            raise ValueError(f"size: the model makes {width}x{height}; ask for that, or for none")
        if image is None:
            return None
        return await asyncio.to_thread(self.images.find, owner, image)

    async def _load(self) -> None:
        models = await asyncio.to_thread(self._warm)
        self._engine = engine = Engine(self._made, self._fail)
        self._jobs = Jobs(models, self.name, self.limits, engine, self._folder / "videos")
        self._sessions = sessions = Sessions(
            models, self.limits, engine, self.capacity, self._saved, self.metrics
        )
        self._begin_task(self._jobs.run())
        self._begin_task(sessions.look_after())

    def _warm(self) -> Models:
        """Load the models, and make chunks until one evicts another.

        By then CUDA graphs are recorded for every number of pages, so no session waits for that.
        The capacity is first measured by these chunks.
        """
        sessions = self.limits.sessions + 1  # jobs have one too
        if self._orders is None:
            models = load_models(self.plan, sessions=sessions)
        else:
            models = LeadingModels(self.plan, self._orders, sessions)
            models.load()
        chunk = len(self.plan.chunking.frames(1)) / self.plan.section.fps
        shots = single_shot(_WARM_UP, (self.plan.geometry.pages + 1) * chunk)
        with models.open(lambda video: None, shots) as stream:
            while report := stream.make():
                self._measure(report)
        _ = models.identity  # which reads every weight: not when there is a hurry to save
        return models

    def _measure(self, report: ChunkReport) -> None:
        """Take in what a chunk cost; the first of a video also takes what comes once."""
        if report.chunk.index > 0:
            transformer = report.seconds - report.text - report.waited
            stages = transformer, sum(report.decoding.values())
            self.capacity.measure(stages, len(report.chunk.frames))

    def _made(self, work: Work, report: ChunkReport) -> None:
        """Count a chunk; in the engine's thread."""
        self._measure(report)
        metrics = self.metrics
        metrics.frames.inc(len(report.chunk.frames))
        metrics.realtime_ratio.set(1 / self.capacity.share(self.plan.section.fps))
        parts = {**report.graphs, **report.decoding, "text": report.text, "wait": report.waited}
        for part, seconds in parts.items():
            metrics.chunk_seconds.labels(part).observe(seconds)

    def metrics_text(self) -> bytes:
        """What Prometheus is told."""
        states = dict.fromkeys(STATES, 0)
        if self._sessions is not None and self._jobs is not None:
            for entry in self._sessions.entries.values():
                states[entry.state] += 1
            states["waiting"] = len(self._sessions.admission)
            self.metrics.jobs.set(len(self._jobs))
        for state, count in states.items():
            self.metrics.sessions.labels(state).set(count)
        device = self.plan.device
        if device.type == "cuda":
            self.metrics.device_bytes.set(torch.cuda.memory_allocated(device))
        return self.metrics.text()
