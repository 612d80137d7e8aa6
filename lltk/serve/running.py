"""The server's process, from its first request to the signal that ends it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from lltk.serve.app import create_app
from lltk.serve.messages import LONGEST_TEXT
from lltk.serve.service import Service

_PING = 20.0
"""Seconds between two pings, and until a client that answers none is taken for gone."""
_GRACE = 5
"""Seconds that requests have to end before the sessions are kept."""


def make_server(
    service: Service, tokens: Sequence[str] = (), hosts: Sequence[str] = ()
) -> uvicorn.Server:
    """A server of a service; its `run` serves until a signal, or until it `should_exit`.

    It ends too where the service fails. Arguments as `create_app`'s.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service, tokens, hosts),
            ws="websockets-sansio",
            ws_max_size=LONGEST_TEXT,
            ws_per_message_deflate=False,  # video is compressed as it is
            ws_ping_interval=_PING,
            ws_ping_timeout=_PING,
            timeout_graceful_shutdown=_GRACE,
            server_header=False,
            log_level="warning",
        )
    )

    def end() -> None:
        server.should_exit = True

    service.failed = end
    return server


def serve(server: uvicorn.Server, service: Service, listener: socket.socket) -> None:
    """Serve until a signal; for the main thread.

    Raises:
        BaseException: the service's failure.
    """
    before = signal.signal(signal.SIGHUP, server.handle_exit)  # the other two uvicorn handles
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGHUP, before)
        service.stop()
    failure, service.failure = service.failure, None  # whose frames hold all that was served
    if failure is not None:
        raise failure


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens.

    Raises:
        ValueError: the port is in use, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"--port: {host}:{port} cannot be listened at ({error.strerror}); name another --port"
        ) from error
    with listener:
        yield listener
