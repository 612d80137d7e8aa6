"""The server's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from lltk import __version__
from lltk.serve.admission import Full
from lltk.serve.answers import refusal
from lltk.serve.messages import PROTOCOL, Close, Error
from lltk.serve.realtime import Connection, reasons
from lltk.serve.security import Guard, Tokens, bearer, spoken
from lltk.serve.service import Service
from lltk.serve.sessions import digest
from lltk.serve.sessions_api import sessions_api
from lltk.serve.videos_api import videos_api

_PAGE = Path(__file__).with_name("page")
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

    app = FastAPI(
        title="lltk serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page asks other hosts for scripts
        redoc_url=None,
    )
    app.add_middleware(Guard, hosts=hosts, largest=2 * service.limits.image_bytes)
    app.include_router(sessions_api(service, accepted))
    app.include_router(videos_api(service, accepted))

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        detail: Any = error.detail
        if not isinstance(detail, dict):
            detail = {"code": "invalid_request", "message": str(detail)}
        if error.status_code == 401:
            service.metrics.rejected.labels("unauthorized").inc()
        return JSONResponse({"error": detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await refused(request, refusal(422, "invalid_request", reasons(error.errors())))

    @app.exception_handler(Full)
    async def full(request: Request, error: Full) -> JSONResponse:
        service.metrics.rejected.labels("over_capacity").inc()
        return await refused(request, refusal(429, "over_capacity", str(error), error.retry_after))

    @app.exception_handler(ValueError)
    async def wrong(request: Request, error: ValueError) -> JSONResponse:
        return await refused(request, refusal(400, "refused", str(error)))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # for nobody

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
        return {"status": "loading"}

    @app.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """What Prometheus asks for."""
        if not accepted.accepts(bearer(request.headers)):
            raise refusal(401, "unauthorized", "token: is missing or wrong")
        return Response(service.metrics_text(), media_type=CONTENT_TYPE_LATEST)

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
            service.metrics.rejected.labels(error["code"]).inc()
            await socket.send_text(Error(**error).model_dump_json())
            await socket.close(close)
            return
        await Connection(service, socket, digest(token or "")).serve()

    # An editable installation has links for files.
    app.mount("/", StaticFiles(directory=_PAGE, html=True, follow_symlink=True))
    return app
