"""Who gets in: room for sessions, and the queue for it."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence

from lltk.serve.messages import SessionQueued
from lltk.serve.settings import Limits

_SOONEST = 1.0
"""Seconds after which anybody may come back."""


class Full(Exception):
    """There is no room, and none to wait in.

    Args:
        message: says why.
        retry_after: seconds after which to come back.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = max(retry_after, _SOONEST)


class Admission:
    """Lets sessions in, first come, first served. For the event loop's thread.

    Args:
        limits: of the server.
        room: whether one more session fits beside so many that are about to begin.
        remaining: seconds that each open session has left at the most.
    """

    def __init__(
        self,
        limits: Limits,
        room: Callable[[int], bool],
        remaining: Callable[[], Sequence[float]],
    ) -> None:
        self._limits = limits
        self._room = room
        self._remaining = remaining
        self._queue: deque[object] = deque()
        self._owners: Counter[str] = Counter()
        self._beginning = 0
        self._moved = asyncio.Event()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._queue)

    def moved(self) -> None:
        """Look again at whether there is room."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def enter(self, owner: str, tell: Callable[[SessionQueued], Awaitable[None]]) -> None:
        """Wait for room. Each entrance is followed by `begun`, and in the end by `left`.

        Args:
            owner: whose session it is.
            tell: told the place in the queue, whenever it changes.

        Raises:
            Full: the owner has as many sessions as one may have, or the queue is full.
        """
        if self._owners[owner] >= self._limits.per_token:
            raise Full(
                f"sessions: {self._limits.per_token} are open or waiting, as many as a token may "
                "have; stop one of them",
                self.estimate(1),
            )
        waits = bool(self._queue) or not self._room(self._beginning)
        if waits and len(self._queue) >= self._limits.queue:
            raise Full(
                f"sessions: there is no room, and {len(self._queue)} wait already; come back later",
                self.estimate(1),
            )
        self._owners[owner] += 1
        try:
            if waits:
                await self._wait(tell)
            self._beginning += 1
        except BaseException:
            self.left(owner)
            raise

    async def _wait(self, tell: Callable[[SessionQueued], Awaitable[None]]) -> None:
        ticket, told = object(), (0, 0)
        self._queue.append(ticket)
        self.moved()
        try:
            while self._queue[0] is not ticket or not self._room(self._beginning):
                moved = self._moved
                place = self._queue.index(ticket) + 1, len(self._queue)
                if place != told:
                    told = place
                    estimate = self.estimate(place[0])
                    await tell(
                        SessionQueued(position=place[0], length=place[1], estimate_s=estimate)
                    )
                await moved.wait()
        finally:
            self._queue.remove(ticket)
            self.moved()

    def begun(self) -> None:
        """Count a session no more as one about to begin: it is open, or it failed to open."""
        self._beginning -= 1

    def left(self, owner: str) -> None:
        """Let go of a session."""
        self._owners[owner] -= 1
        self._owners += Counter()  # forgets those that have none
        self.moved()

    def estimate(self, place: int) -> float:
        """Seconds until the one at a place gets in, if sessions last as long as they may."""
        remaining = sorted(self._remaining())
        if not remaining:
            return 0.0
        rounds, index = divmod(place - 1, len(remaining))
        return remaining[index] + rounds * self._limits.seconds
