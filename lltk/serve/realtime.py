"""A client's connection: ``WS /v1/realtime/video``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ValidationError

from lltk.serve.admission import Full
from lltk.serve.engine import SESSION_ERRORS
from lltk.serve.messages import (
    FROM_CLIENT,
    LONGEST_TEXT,
    ClientPlayback,
    Close,
    Code,
    Error,
    FromClient,
    SessionCreated,
    SessionInteraction,
    SessionPause,
    SessionPing,
    SessionPlay,
    SessionPong,
    SessionResume,
    SessionStart,
    SessionStop,
)
from lltk.serve.service import Service
from lltk.serve.sessions import Entry

Opened = TypeVar("Opened")
_log = logging.getLogger(__name__)
_FIRST = 30.0
"""Seconds within which the first message comes."""
_COME_BACK = 5.0
"""Seconds after which a client whose session was put away may wait for room again."""
_MOST_WRONG = 16
"""Messages of one connection that may be wrong."""
_RATE = 100.0
"""Messages of one connection a second, and at once; more wait."""
_LONGEST_REASON = 400
"""Characters of what is wrong with a message."""


class Refused(Exception):
    """Ends a connection, with what the client is told."""

    def __init__(self, close: Close, code: Code, message: str, **more: Any) -> None:
        super().__init__(message)
        self.close = close
        self.error = Error(code=code, message=message, **more)


class Connection:
    """Serves one accepted connection to its end.

    Args:
        service: of the server.
        socket: accepted.
        owner: the digest of the client's token.
    """

    def __init__(self, service: Service, socket: WebSocket, owner: str) -> None:
        self._service = service
        self._socket = socket
        self._owner = owner
        self._sending = asyncio.Lock()
        self._entry: Entry | None = None
        self._wrong = 0
        self._paced = 0.0
        """When its messages so far would have come, at that rate."""

    async def serve(self) -> None:
        """Serve it; the session of a connection that is lost can be resumed."""
        close = Close.DONE
        try:
            if not self._service.ready:
                raise Refused(
                    Close.LATER,
                    "over_capacity",
                    "server: the models are still being loaded; come back soon",
                    retryable=True,
                    retry_after=5.0,
                )
            async with asyncio.timeout(_FIRST):
                first = await self._receive()
            await _first_done(self._read(), self._watch(first))
        except WebSocketDisconnect:
            return
        except TimeoutError:
            close = Close.POLICY
            await self._tell_last(Error(code="invalid_message", message="no message came"))
        except Refused as refusal:
            close = refusal.close
            self._service.metrics.rejected.labels(refusal.error.code).inc()
            await self._tell_last(refusal.error)
        finally:
            self._forget()
        await self._end(close)

    async def _tell_last(self, error: Error) -> None:
        try:
            await self._send(error)
        except (WebSocketDisconnect, RuntimeError):
            return

    async def _end(self, close: Close) -> None:
        try:
            await self._socket.close(close)
        except (WebSocketDisconnect, RuntimeError):  # it is gone already
            return

    def _forget(self) -> None:
        entry = self._entry
        if entry is not None and entry.connection is self:
            entry.connection, entry.lost = None, time.monotonic()

    # What comes

    async def _receive(self) -> FromClient:
        """The next message that is right."""
        while True:
            event = await self._socket.receive()
            await self._pace()
            if event["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(event.get("code", 1006))
            text = event.get("text")
            if text is None:
                raise Refused(Close.BINARY, "invalid_message", "message: binary; send JSON as text")
            if len(text.encode()) > LONGEST_TEXT:
                raise Refused(
                    Close.TOO_LARGE,
                    "too_large",
                    f"message: longer than {LONGEST_TEXT} bytes; upload images by POST /v1/files",
                )
            try:
                return FROM_CLIENT.validate_json(text, strict=True)
            except ValidationError as error:
                self._wrong += 1
                reason = explained(error)
                if self._entry is None or self._wrong > _MOST_WRONG:
                    raise Refused(Close.POLICY, "invalid_message", reason) from error
                await self._send(Error(code="invalid_message", message=reason))

    async def _pace(self) -> None:
        """Let a client that sends too much wait, rather than all others."""
        now = time.monotonic()
        self._paced = max(self._paced, now - 1) + 1 / _RATE
        await asyncio.sleep(max(self._paced - now, 0))

    async def _read(self) -> None:
        """Do what messages say, until the client is gone, or stops while it waits."""
        while True:
            message = await self._receive()
            if isinstance(message, SessionPing):
                await self._send(SessionPong())
            elif self._entry is not None:
                await self._act(self._entry, message)
            elif isinstance(message, SessionStop):
                return
            elif not isinstance(message, ClientPlayback):
                said = f"{message.type}: the session has not begun; send it after session.created"
                await self._refuse(message, said)

    async def _act(self, entry: Entry, message: FromClient) -> None:
        """Do what a message says to a session."""
        service, live = self._service, entry.live
        try:
            if isinstance(message, ClientPlayback):
                live.played(message.position, message.buffered)
            elif isinstance(message, SessionInteraction):
                given = message.interaction
                await self._send(live.interact(given.event_id, given.event))
            elif isinstance(message, SessionPause | SessionPlay):
                receipt = live.hold(isinstance(message, SessionPause), message.event_id)
                service.sessions.admission.moved()
                if receipt is not None:
                    await self._send(receipt)
            elif isinstance(message, SessionStop):
                await service.sessions.end(entry, "stopped")
            else:
                raise ValueError(f"{message.type}: the session has begun; send it first of all")
        except ValueError as error:
            await self._refuse(message, str(error))
        service.engine.poke()

    async def _refuse(self, message: FromClient, reason: str) -> None:
        """Say why a message is not done, of an event by its name."""
        name = None
        if isinstance(message, SessionInteraction):
            name = message.interaction.event_id
        elif isinstance(message, SessionPause | SessionPlay):
            name = message.event_id
        await self._send(Error(code="refused", message=reason, event_id=name))

    # What goes

    async def _send(self, message: BaseModel, data: bytes | None = None) -> None:
        """Send a message, and the binary one that belongs to it."""
        async with self._sending:
            await self._socket.send_text(message.model_dump_json())
            if data is not None:
                await self._socket.send_bytes(data)

    async def _watch(self, first: FromClient) -> None:
        """Open the session, and send its parts as they are made, to its end."""
        sequence = -1
        if isinstance(first, SessionStart):
            entry, token = await self._start(first)
        elif isinstance(first, SessionResume):
            entry, token, sequence = (
                await self._resume(first),
                first.resume_token,
                first.after_sequence,
            )
        else:
            raise Refused(
                Close.POLICY,
                "invalid_message",
                f"{first.type}: no session has begun; send session.start or session.resume first",
            )
        self._entry, entry.connection = entry, self
        entry.changed.set()  # tells another connection that it is no more the one
        terms = entry.live.terms
        expires = self._service.limits.expires
        await self._send(SessionCreated(session_id=terms.id, resume_token=token, expires_s=expires))
        await self._send_parts(entry, sequence)

    async def _send_parts(self, entry: Entry, sequence: int) -> None:
        """Send what comes after a part."""
        live, begun = entry.live, None
        while entry.connection is self:
            entry.changed.clear()
            over = not entry.is_open
            part = live.ring.after(sequence)
            beginning = part.beginning if part else live.beginning
            if beginning is not None and beginning is not begun:
                begun = beginning
                await self._send(begun.message, begun.init)
            if part is not None:
                await self._send(part.message, part.data)
                sequence = part.message.sequence
            elif over:
                if entry.done is None:
                    raise Refused(
                        Close.INTERNAL,
                        "internal",
                        "session: a chunk could not be made; the server's log says why",
                    )
                await self._send(entry.done)
                return
            else:
                await entry.changed.wait()
        if entry.connection is None:
            raise Refused(
                Close.LATER,
                "over_capacity",
                "session: it was paused while others wait, and is kept; resume it to play on",
                retryable=True,
                retry_after=_COME_BACK,
            )
        raise Refused(Close.POLICY, "taken_over", "session: another connection has resumed it")

    async def _start(self, message: SessionStart) -> tuple[Entry, str]:
        return await self._opened(self._service.begin(self._owner, message, self._send))

    async def _resume(self, message: SessionResume) -> Entry:
        opening = self._service.sessions.resume(
            message.session_id, message.resume_token, self._send
        )
        entry = await self._opened(opening)
        if entry is None:
            raise Refused(
                Close.POLICY,
                "not_found",
                "session: there is none with this id and token, or it was kept for too long; "
                "start another",
            )
        if message.after_sequence >= entry.live.progress.sequence:
            raise _refused("after_sequence: no such part has been made; give the last that came")
        return entry

    async def _opened(self, opening: Coroutine[Any, Any, Opened]) -> Opened:
        """What opening gives; a refusal is the client's to be told."""
        try:
            return await opening
        except Full as full:
            raise Refused(
                Close.LATER,
                "over_capacity",
                str(full),
                retryable=True,
                retry_after=full.retry_after,
            ) from full
        except ValueError as error:
            raise _refused(str(error)) from error
        except SESSION_ERRORS as error:
            _log.exception("a session could not be opened")
            message = "session: it could not be opened; the server's log says why"
            raise Refused(Close.INTERNAL, "internal", message) from error


async def _first_done(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run them together until one is done; raises what that raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    try:
        for task in done:
            task.result()
    finally:
        del tasks, done, task  # what they raise holds this frame, and so a whole session


def _refused(message: str) -> Refused:
    return Refused(Close.POLICY, "refused", message)


def explained(error: ValidationError) -> str:
    """What is wrong with a message, without the message itself."""
    return reasons(error.errors(include_url=False, include_input=False, include_context=False))


def reasons(errors: Iterable[Mapping[str, Any]]) -> str:
    """Pydantic's errors in words."""
    said = []
    for each in errors:
        where = ".".join(str(place) for place in each["loc"])
        message = each["msg"].removeprefix("Value error, ")
        if each["loc"]:
            message = f"{where}: " + message.removeprefix(f"{each['loc'][-1]}: ")
        said.append(message)
    return "; ".join(said)[:_LONGEST_REASON]
