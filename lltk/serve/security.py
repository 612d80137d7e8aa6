"""Who may talk to the server, and what a browser may do with what it says."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lltk.files.reading import read_text
from lltk.serve.messages import TOKEN

_TOKEN = re.compile(r"[A-Za-z0-9._~-]+")
"""What a subprotocol (RFC 6455) and a URL's fragment may hold as it is."""
_HEADERS = {
    "content-security-policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' blob: "
    "data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def is_loopback(host: str) -> bool:
    """Whether a host to bind is this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_tokens(path: Path) -> list[str]:
    """The tokens of a file, one a line.

    Raises:
        ValueError: it has none, or cannot be read as text.
    """
    tokens = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not tokens:
        raise ValueError(f"{path}: has no token; write one a line")
    return tokens


def check_tokens(tokens: Iterable[str]) -> None:
    """Check that browsers can send tokens.

    Raises:
        ValueError: one is empty, or has a sign that no subprotocol may have.
    """
    if not all(_TOKEN.fullmatch(token) for token in tokens):
        raise ValueError("token: write it in letters, digits and - . _ ~, at least one of them")


class Tokens:
    """The tokens that open a server; none where everybody may use it.

    Args:
        tokens: as clients send them.

    Raises:
        ValueError: as `check_tokens`.
    """

    def __init__(self, tokens: Sequence[str] = ()) -> None:
        check_tokens(tokens)
        self._tokens = [_digest(token) for token in tokens]

    def accepts(self, given: str | None) -> bool:
        """Whether a token is one of them, in a time that does not depend on how wrong it is."""
        if not self._tokens:
            return True
        known = _digest(given or "")
        return sum(hmac.compare_digest(known, token) for token in self._tokens) > 0


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def bearer(headers: Headers) -> str | None:
    """The token of a request's ``Authorization: Bearer`` header."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def spoken(subprotocols: Sequence[str]) -> str | None:
    """The token among a WebSocket's subprotocols."""
    return next((name[len(TOKEN) :] for name in subprotocols if name.startswith(TOKEN)), None)


class _TooLarge(Exception):
    """A request's body is longer than it may be."""


class Guard:
    """Refuses requests under another name of the host, or from another origin.

    A page elsewhere could have a browser send requests here: an ``Origin`` has to be this server's.
    A name that leads here, but is not among those that are served, could make another page's
    origin out of this server (DNS rebinding). Bodies are bounded.

    Args:
        app: what is guarded.
        hosts: names, without ports, under which the server is reached; none for any.
        largest: bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], largest: int) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        self._largest = largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        status, reason = self._refusal(headers)
        if reason:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": reason})
            else:
                await PlainTextResponse(reason, status)(scope, receive, send)
            return
        try:
            await self._app(scope, self._bounded(receive), _adding(send))
        except _TooLarge:  # routes read the body before they answer
            answer = PlainTextResponse(f"body: more than {self._largest} bytes", 413)
            await answer(scope, receive, send)

    def _refusal(self, headers: Headers) -> tuple[int, str]:
        host = headers.get("host", "").lower()
        name = urlsplit(f"//{host}").hostname if host and _place(f"//{host}") == host else None
        if name is None or (self._hosts and name not in self._hosts):
            return 421, "host: this server is not reached by that name; see --public-host"
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host:
            return 403, "origin: another page's requests are refused"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._largest:
            return 413, f"body: more than {self._largest} bytes"
        return 200, ""

    def _bounded(self, receive: Receive) -> Receive:
        """Gives no more of a body than it may have, whatever length it named."""
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._largest:
                    raise _TooLarge
            return message

        return bounded


def _place(url: str) -> str | None:
    """Host and port of a URL; None if it is none."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return None


def _adding(send: Send) -> Send:
    """Adds what a browser is told about every answer."""

    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return adding
