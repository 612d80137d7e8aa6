"""The server's process, from its first request to the signal that ends it."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from lltk.serve.messages import LONGEST_TEXT

_PING = 20.0
"""Seconds between two pings, and until a client that answers none is taken for gone."""
_GRACE = 5
"""Seconds that requests have to end before the sessions are kept."""


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; the application then keeps what it has.

    Args:
        app: what is served.
        listener: a listening socket.
    """
    config = uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=LONGEST_TEXT,
        ws_ping_interval=_PING,
        ws_ping_timeout=_PING,
        timeout_graceful_shutdown=_GRACE,
        server_header=False,
        log_level="warning",
    )
    uvicorn.Server(config).run(sockets=[listener])
