"""The live sessions of a server: opened, watched, left, kept on disk and resumed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal
from weakref import WeakValueDictionary

from torch import Tensor

from lltk.serve.admission import Admission
from lltk.serve.engine import SESSION_ERRORS, Engine
from lltk.serve.live import Live, Progress, Terms
from lltk.serve.messages import SessionDone, SessionQueued
from lltk.serve.metrics import Metrics
from lltk.serve.ring import Ring
from lltk.serve.saved import Saved
from lltk.serve.scheduling import Capacity
from lltk.serve.settings import Limits
from lltk.stream.script import Shot
from lltk.streaming import Models, Stream

_LOOK = 1.0
_CLEANING = 60.0
"""Seconds between two looks at the sessions, and at those on disk."""
_log = logging.getLogger(__name__)
Tell = Callable[[SessionQueued], Awaitable[None]]


def digest(secret: str) -> str:
    """What stands for a secret where it is kept."""
    return hashlib.sha256(secret.encode()).hexdigest()


def same(secret: str, kept: str) -> bool:
    """Whether a secret has a digest, in a time that does not depend on either."""
    return hmac.compare_digest(digest(secret), kept)


@dataclass(eq=False)
class Entry:
    """A session of a server. For the event loop's thread.

    Attributes:
        live: the session.
        changed: set whenever there is something new for the client.
        connection: whoever watches it; None for nobody.
        lost: when the last connection was lost.
        is_open: whether it has memory of its own.
        done: how it ended; None as long as it goes on, and where it failed.
        moving: held while it ends, or leaves its memory.
    """

    live: Live
    changed: asyncio.Event
    connection: object | None = None
    lost: float = field(default_factory=time.monotonic)
    is_open: bool = True
    done: SessionDone | None = None
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def state(self) -> Literal["playing", "paused", "ended"]:
        """What it does."""
        if not self.is_open:
            return "ended"
        return "paused" if self.live.progress.paused else "playing"


class Sessions:
    """The live sessions of a server. For the event loop's thread.

    Args:
        models: loaded.
        limits: of the server.
        engine: makes the chunks.
        capacity: measured by the engine's chunks.
        saved: where sessions go that leave their memory.
        metrics: are told what clients see.
    """

    def __init__(
        self,
        models: Models,
        limits: Limits,
        engine: Engine,
        capacity: Capacity,
        saved: Saved,
        metrics: Metrics,
    ) -> None:
        self.limits = limits
        self.entries: dict[str, Entry] = {}
        self._models = models
        self._engine = engine
        self._capacity = capacity
        self._saved = saved
        self._metrics = metrics
        self._resuming: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Held for each session that somebody resumes."""
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.admission = Admission(limits, self._room, self._remaining)

    # Opening

    async def start(
        self,
        owner: str,
        shots: Sequence[Shot],
        tell: Tell,
        *,
        image: Tensor | None = None,
        seed: int | None = None,
        recache: bool | None = None,
        seconds: float | None = None,
    ) -> tuple[Entry, str]:
        """Open a session once there is room; returns it and its resume token.

        Raises:
            Full: there is no room, and none to wait in.
            ValueError: the models refuse it.
        """
        token = secrets.token_urlsafe(32)
        limit = min(seconds or self.limits.seconds, self.limits.seconds)
        terms = Terms(secrets.token_hex(16), owner, digest(token), limit, recache)
        ring = Ring(self._frames(self.limits.ring))
        opening = partial(self._models.open, script=shots, image=image, seed=seed)
        return await self._open(terms, ring, Progress(), opening, tell), token

    async def resume(self, id: str, token: str, tell: Tell) -> Entry | None:
        """A session that is open, or was left; None if there is none with this token.

        Raises:
            Full: it has left its memory, and there is no room.
        """
        async with self._resuming.setdefault(id, asyncio.Lock()):  # or two would open it from disk
            return await self._resume(id, token, tell)

    async def _resume(self, id: str, token: str, tell: Tell) -> Entry | None:
        if (entry := self.entries.get(id)) is not None:
            if not same(token, entry.live.terms.secret):
                return None
            async with entry.moving:  # which may be on its way to disk
                if self.entries.get(id) is entry:
                    return entry
        kept = await asyncio.to_thread(self._saved.read, id)
        if kept is None or not same(token, kept.terms.secret):
            return None
        ring = Ring(self._frames(self.limits.ring), kept.parts)
        opening = partial(self._models.open, resume=kept.state)
        entry = await self._open(kept.terms, ring, kept.progress, opening, tell)
        await asyncio.to_thread(self._saved.remove, id)
        return entry

    async def _open(
        self, terms: Terms, ring: Ring, progress: Progress, opening: partial[Stream], tell: Tell
    ) -> Entry:
        await self.admission.enter(terms.owner, tell)
        try:
            changed = asyncio.Event()
            live = Live(
                terms,
                self._models.plan,
                ring,
                progress,
                self._metrics,
                lambda: self._loop.call_soon_threadsafe(self._tell, changed),
            )

            def open_it() -> None:
                stream = opening(live.deliver, endless=True, begun=live.begun)
                if progress.paused:
                    stream.pause()
                live.enter(stream)

            thread = asyncio.ensure_future(asyncio.to_thread(open_it))
            try:
                await asyncio.shield(thread)
            except asyncio.CancelledError:  # the client is gone, and nobody knows of the session
                await thread
                await asyncio.to_thread(live.leave)
                raise
        except BaseException:
            self.admission.begun()
            self.admission.left(terms.owner)
            raise
        entry = self.entries[terms.id] = Entry(live, changed)
        self.admission.begun()
        self._engine.add(live)
        return entry

    def _tell(self, changed: asyncio.Event) -> None:
        """There is something new of a session."""
        changed.set()
        self._news.set()
        self._engine.poke()  # what was sent is played, so that more may be due

    def _frames(self, seconds: float) -> int:
        return round(seconds * self._models.plan.section.fps)

    # Room

    def _room(self, beginning: int) -> bool:
        """Whether one more session fits beside so many that are about to begin."""
        fps = self._models.plan.section.fps
        open_now = [entry.live for entry in self.entries.values() if entry.is_open]
        playing = sum(not live.progress.paused for live in open_now)
        fits = self._capacity.fits(playing + beginning, fps)
        return fits and len(open_now) + beginning < self.limits.sessions

    def _remaining(self) -> list[float]:
        return [entry.live.remaining for entry in self.entries.values() if entry.is_open]

    # Ending

    async def end(self, entry: Entry, reason: Literal["stopped", "limit"]) -> None:
        """Make no more of a session; what is made can still be taken."""
        async with entry.moving:
            if entry.is_open:
                await self._leave(entry)
                if entry.live.failure is None:
                    entry.done = SessionDone(chunks=entry.live.chunks, reason=reason)
                entry.changed.set()

    async def _leave(self, entry: Entry) -> None:
        """Let another session have the memory."""
        live = entry.live
        await asyncio.to_thread(self._engine.remove, live)
        try:
            await asyncio.to_thread(live.leave)
        except SESSION_ERRORS as error:
            _log.exception("a session's last frames cannot be made")
            live.failure = error
        finally:
            entry.is_open = False
            self.admission.left(live.terms.owner)

    async def look_after(self) -> None:
        """End sessions that are over or failed, and let go of those that nobody watches.

        Nobody watches a session that is paused while others wait for its memory.

        Until it is cancelled.
        """
        cleaned = -math.inf
        while True:
            await self._look_at_all()
            if time.monotonic() - cleaned > _CLEANING:
                cleaned = time.monotonic()
                await asyncio.to_thread(self._saved.clean, self.limits.kept)
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(_LOOK, self.limits.expires)):
                    await self._news.wait()

    async def _look_at_all(self) -> None:
        for entry in list(self.entries.values()):
            await self._look_at(entry)

    async def _look_at(self, entry: Entry) -> None:
        live = entry.live
        if entry.is_open and live.failure is not None:
            async with entry.moving:
                await self._leave(entry)
                entry.changed.set()
        elif entry.is_open and live.over:
            await self.end(entry, "limit")
        now = time.monotonic()
        if entry.connection is None:
            if now - entry.lost > self.limits.expires:
                await self.put_away(entry)
        elif self._is_in_the_way(entry) and now - live.paused_at > self.limits.expires:
            entry.connection, entry.lost = None, -math.inf
            entry.changed.set()

    def _is_in_the_way(self, entry: Entry) -> bool:
        """Whether a session is paused and has memory that another one waits for."""
        taken = sum(each.is_open for each in self.entries.values())
        waited_for = len(self.admission) > 0 and taken >= self.limits.sessions
        return entry.state == "paused" and waited_for

    async def put_away(self, entry: Entry) -> None:
        """Move a session to disk, from where it can be resumed; forget it if it is over."""
        live = entry.live
        async with entry.moving:
            if self.entries.get(live.terms.id) is not entry:
                return
            if entry.is_open:
                await asyncio.to_thread(self._engine.remove, live)
                try:
                    if live.failure is None:
                        await asyncio.to_thread(self._saved.write, live)
                except SESSION_ERRORS:
                    _log.exception("a session cannot be kept")
                finally:
                    await self._leave(entry)
            del self.entries[live.terms.id]

    async def state(self, entry: Entry) -> bytes:
        """A session's state between two chunks; it then goes on.

        Raises:
            ValueError: it is over, or each of several ranks has a part of its state.
        """
        live = entry.live
        if self._models.plan.ranks > 1:
            raise ValueError(
                "state: each of the server's ranks has a part of it; ask a server of one rank"
            )
        async with entry.moving:
            if not entry.is_open or live.failure is not None:
                raise ValueError("session: it is over; ask for the state of one that goes on")
            await asyncio.to_thread(self._engine.remove, live)
            try:
                return await asyncio.to_thread(self._saved.state, live)
            finally:
                self._engine.add(live)

    async def close(self) -> None:
        """Move every session to disk."""
        for entry in list(self.entries.values()):
            await self.put_away(entry)
