"""The server's process, from its first request to the signal that ends it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from lltk.serve.messages import LONGEST_TEXT

_PING = 20.0
"""Seconds between two pings, and until a client that answers none is taken for gone."""
_GRACE = 5
"""Seconds that requests have to end before the sessions are kept."""


def make_server(app: FastAPI) -> uvicorn.Server:
    """A server of an application; its `run` serves until a signal, or until it `should_exit`."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            ws="websockets-sansio",
            ws_max_size=LONGEST_TEXT,
            ws_ping_interval=_PING,
            ws_ping_timeout=_PING,
            timeout_graceful_shutdown=_GRACE,
            server_header=False,
            log_level="warning",
        )
    )


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
