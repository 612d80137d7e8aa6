"""The thread that owns the device."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from threading import Condition, Thread
from typing import Protocol

from lltk.serve.scheduling import Demand, choose
from lltk.stream.report import ChunkReport

_BLOCKED = 0.01
"""Seconds until a session is asked again whose prompt or decoder is not ready."""
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

    Args:
        made: called in the thread with each work's report.
    """

    def __init__(self, made: Callable[[Work, ChunkReport], None]) -> None:
        self._made = made
        self._works: list[Work] = []
        self._making: Work | None = None
        self._closed = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

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

    def close(self) -> None:
        """End the thread once the chunk in flight is made."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                report = work.make()
                if report is not None:
                    self._made(work, report)
            except Exception as error:  # one session's failure is not another's
                _log.exception("a chunk failed")
                with self._changed:
                    self._works.remove(work)
                work.fail(error)
            finally:
                with self._changed:
                    self._making = None
                    self._changed.notify_all()

    def _next(self) -> Work | None:
        """The work whose chunk is made next; waits for one. None in the end."""
        with self._changed:
            while not self._closed:
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
                if chosen is not None:
                    self._making = chosen
                    return chosen
                wait = min(wait, _BLOCKED) if blocked else wait
                self._changed.wait(None if math.isinf(wait) else wait)
        return None
