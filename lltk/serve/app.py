"""The server's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response, WebSocket

from lltk import __version__
from lltk.serve.messages import PROTOCOL, Close, Error
from lltk.serve.realtime import Connection
from lltk.serve.security import Guard, Tokens, bearer, spoken
from lltk.serve.service import Service
from lltk.serve.sessions import digest

_OTHER = PROTOCOL.rpartition("v")[0] + "v"
"""What the names of all versions begin with."""


def create_app(service: Service, tokens: Sequence[str] = (), hosts: Sequence[str] = ()) -> FastAPI:
    """The application of a service, which begins and ends with it.

    Args:
        service: what is served.
        tokens: that clients need; none for no need.
        hosts: names under which it is reached; none for any.
    """
    accepted = Tokens(tokens)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(title="lltk serve", version=__version__, lifespan=lifespan)
    app.add_middleware(Guard, hosts=hosts, largest=service.limits.image_bytes + (1 << 20))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(response: Response) -> dict[str, str]:
        """Whether sessions can be opened: 503 until the models are loaded."""
        if service.ready:
            return {"status": "ready"}
        response.status_code = 503
        return {"status": "loading" if service.failure is None else "failed"}

    @app.websocket("/v1/realtime/video")
    async def realtime(socket: WebSocket) -> None:
        offered: list[str] = socket.scope.get("subprotocols", [])
        await socket.accept(PROTOCOL if PROTOCOL in offered else None)
        versions = [name for name in offered if name.startswith(_OTHER)]
        token = spoken(offered) or bearer(socket.headers)
        error: dict[str, Any] | None = None
        close = Close.POLICY
        if versions and PROTOCOL not in versions:
            close = Close.PROTOCOL
            error = {"code": "protocol_version", "message": f"protocol: speak {PROTOCOL}"}
        elif not accepted.accepts(token):
            error = {"code": "unauthorized", "message": "token: is missing or wrong"}
        if error is not None:
            await socket.send_text(Error(**error).model_dump_json())
            await socket.close(close)
            return
        await Connection(service, socket, digest(token or "")).serve()

    return app
