"""The thread that owns the device."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from typing import Protocol

from av.error import FFmpegError
from torch import OutOfMemoryError

from lltk.serve.scheduling import Demand, choose
from lltk.stream.report import ChunkReport
from lltk.streaming import LostRank

_BLOCKED = 0.01
"""Seconds until a session is asked again whose prompt or decoder is not ready."""
SESSION_ERRORS = (ValueError, OSError, FFmpegError, OutOfMemoryError)
"""What is raised where a session's values, files, encoder or memory fail; the others go on."""
_log = logging.getLogger(__name__)


class Work(Protocol):
    """What chunks are made for."""

    def demand(self) -> Demand | None:
        """What it asks of the device; None if nothing, until `Engine.poke`."""

    @property
    def ready(self) -> bool:
        """Whether `make` would begin at once."""

    def make(self) -> ChunkReport | None:
        """Make a chunk."""

    def fail(self, error: Exception) -> None:
        """Take in what `make` raised; it is asked for nothing more."""


class Engine:
    """Makes chunks in a thread of its own, for the work that is needed first.

    What fails with one work's chunk is that work's. Where the device itself fails, or another rank,
    no more chunks are made.

    Args:
        made: called in the thread with each work's report.
        failed: called in the thread with what ends it.
    """

    def __init__(
        self, made: Callable[[Work, ChunkReport], None], failed: Callable[[BaseException], None]
    ) -> None:
        self._made = made
        self._failed = failed
        self._works: list[Work] = []
        self._making: Work | None = None
        self._closed = False
        self._changed = Condition()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._thread.submit(self._run).add_done_callback(self._ended)

    def add(self, work: Work) -> None:
        """Make chunks for a work."""
        with self._changed:
            self._works.append(work)
            self._changed.notify_all()

    def remove(self, work: Work) -> None:
        """Make no more chunks for a work; waits for the one in flight."""
        with self._changed:
            if work in self._works:
                self._works.remove(work)
            self._changed.wait_for(lambda: self._making is not work)

    def poke(self) -> None:
        """Ask every work again."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Begin no more chunks, and end the thread; waits for nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread once the chunk in flight is made."""
        self.stop()
        self._thread.shutdown()

    def _ended(self, running: Future[None]) -> None:
        if (error := running.exception()) is not None:
            self._failed(error)

    def _run(self) -> None:
        while self._make_one():
            pass

    def _make_one(self) -> bool:
        """Make the chunk that is needed first; waits for one. False in the end."""
        work = self._next()
        if work is None:
            return False
        try:
            report = work.make()
            if report is not None:
                self._made(work, report)
        except LostRank:
            raise
        except SESSION_ERRORS as error:
            _log.exception("a chunk failed")
            with self._changed:
                self._works.remove(work)
            work.fail(error)
        finally:
            with self._changed:
                self._making = None
                self._changed.notify_all()
        return True

    def _next(self) -> Work | None:
        """The work whose chunk is made next; waits for one. None in the end."""
        with self._changed:
            while not self._closed:
                self._making, wait = self._choice()
                if self._making is not None:
                    return self._making
                self._changed.wait(None if math.isinf(wait) else wait)
        return None

    def _choice(self) -> tuple[Work | None, float]:
        """The work whose chunk is made now, or None and the seconds until one may be."""
        now, blocked = time.monotonic(), False
        demands: list[tuple[Work, Demand]] = []
        for work in self._works:
            demand = work.demand()
            if demand is None:
                continue
            if demand.due() > now or work.ready:
                demands.append((work, demand))
            else:
                blocked = True
        chosen, wait = choose(demands, now)
        return chosen, min(wait, _BLOCKED) if blocked else wait
