"""What the REST routes have in common: who asks, and how a request is refused."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from lltk.serve.messages import Message
from lltk.serve.security import Tokens, bearer
from lltk.serve.service import Service
from lltk.serve.sessions import digest


class Failure(Message):
    """What is wrong with a request."""

    code: str
    message: str


class Failed(Message):
    """The answer to a request that is refused."""

    error: Failure


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Failed}
    for status in (400, 401, 403, 404, 405, 409, 413, 415, 421, 422, 429, 503)
}
"""For OpenAPI: how any request may be refused."""


def refusal(
    status: int, code: str, message: str, retry_after: float | None = None
) -> HTTPException:
    """The error of a refused request.

    Args:
        status: of HTTP.
        code: what kind of error, for a program.
        message: says what to change.
        retry_after: seconds after which to come back.
    """
    headers = None if retry_after is None else {"retry-after": str(max(1, round(retry_after)))}
    return HTTPException(status, {"code": code, "message": message}, headers)


def asking(tokens: Tokens) -> Callable[[Request], str]:
    """A dependency: the digest of a request's token, which has to be right."""

    def owner(request: Request) -> str:
        token = bearer(request.headers)
        if not tokens.accepts(token):
            raise refusal(401, "unauthorized", "token: is missing or wrong")
        return digest(token or "")

    return owner


def routes(tokens: Tokens) -> type[APIRoute]:
    """Routes that want the token before they read a body, which dependencies come after."""
    owner = asking(tokens)

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handled(request: Request) -> Response:
                owner(request)
                return await handle(request)

            return handled

    return Route


def when_ready(service: Service) -> Callable[[], None]:
    """A dependency: the models are loaded."""

    def ready() -> None:
        if not service.ready:
            raise refusal(503, "loading", "server: the models are still being loaded", 5.0)

    return ready
