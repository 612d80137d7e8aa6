"""All that a server has: models, engine, sessions and jobs, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from lltk.serve.engine import Engine, Work
from lltk.serve.saved import Saved
from lltk.serve.scheduling import Capacity
from lltk.serve.sessions import Sessions
from lltk.serve.settings import Limits
from lltk.stream.report import ChunkReport
from lltk.stream.script import single_shot
from lltk.streaming import Models, Plan, load_models

_WARM_UP = "a red circle moving right"
"""Any prompt does."""
_WARM_CHUNKS = 3
_TICK = 1.0
"""Seconds between two looks after the sessions."""
_log = logging.getLogger(__name__)


class Service:
    """A server's parts. `start` returns at once; `sessions` is there when it is `ready`.

    Args:
        plan: of the streams, with weights.
        name: of the model, for clients.
        limits: of the server.
        folder: of this server alone, where it keeps sessions and videos.
    """

    def __init__(self, plan: Plan, name: str, limits: Limits, folder: Path) -> None:
        self.plan = plan
        self.name = name
        self.limits = limits
        self.capacity = Capacity()
        self.saved = Saved(folder / "sessions")
        self.failure: Exception | None = None
        """Why it will never be ready."""
        self._sessions: Sessions | None = None
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
    def engine(self) -> Engine:
        """Makes the chunks; ask when it is ready."""
        assert self._engine is not None
        return self._engine

    async def start(self) -> None:
        """Begin to load the models."""
        self._tasks.append(asyncio.create_task(self._load()))

    async def close(self) -> None:
        """Keep every session on disk, and end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._sessions is not None:
            await self._sessions.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)

    async def _load(self) -> None:
        try:
            models = await asyncio.to_thread(self._warm)
        except (ValueError, OSError, RuntimeError) as error:
            self.failure = error
            _log.exception("the models cannot be loaded")
            return
        self._engine = Engine(self._made)
        self._sessions = Sessions(models, self.limits, self._engine, self.capacity, self.saved)
        while True:
            await asyncio.sleep(_TICK)
            await self._sessions.look_after()

    def _warm(self) -> Models:
        """Load the models, and make a few chunks, by which the capacity is first measured."""
        models = load_models(self.plan, sessions=self.limits.sessions + 1)
        chunk = len(self.plan.chunking.frames(1)) / self.plan.section.fps
        shots = single_shot(_WARM_UP, _WARM_CHUNKS * chunk)
        with models.open(lambda video: None, shots) as stream:
            for report in stream:
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
        self._measure(report)
