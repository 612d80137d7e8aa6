"""The routes of models, images and live sessions."""

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, UploadFile
from fastapi.responses import Response

from lltk.serve.admission import Full
from lltk.serve.answers import REFUSALS, asking, refusal, routes, when_ready
from lltk.serve.messages import Message, SessionQueued, SessionStart
from lltk.serve.security import Tokens
from lltk.serve.service import Service
from lltk.serve.sessions import Entry


class Model(Message):
    """A served model, and the videos that it makes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lltk"
    width: int
    height: int
    fps: float
    chunk_frames: int
    max_seconds: float


class ModelList(Message):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[Model]


class File(Message):
    """An image that is kept."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    purpose: Literal["vision"] = "vision"


class Session(Message):
    """A session that waits for a connection: resume it over ``ws``."""

    id: str
    resume_token: str
    ws: str
    expires_s: float


class SessionRequest(SessionStart):
    """What ``session.start`` says, without its type."""

    type: Literal["session.start"] = "session.start"


class SessionState(Message):
    """How far a session is.

    Attributes:
        id: names it.
        state: what it does.
        connected: whether somebody watches it.
        chunks: how many are made.
        remaining_s: seconds of video that may still be made.
    """

    id: str
    state: Literal["playing", "paused", "ended"]
    connected: bool
    chunks: int
    remaining_s: float


def sessions_api(service: Service, tokens: Tokens) -> APIRouter:
    """The routes of a service.

    Args:
        service: what is served.
        tokens: that clients need.
    """
    ready = [Depends(when_ready(service))]
    api = APIRouter(
        prefix="/v1", responses=REFUSALS, dependencies=ready, route_class=routes(tokens)
    )
    Owner = Annotated[str, Depends(asking(tokens))]

    def entry_of(owner: str, id: str) -> Entry:
        entry = service.sessions.entries.get(id)
        if entry is None or entry.live.terms.owner != owner:
            raise refusal(404, "not_found", "session: there is none of this id")
        return entry

    @api.get("/models")
    async def models(owner: Owner) -> ModelList:
        """The model that is served, and the videos that it makes."""
        plan = service.plan
        height, width = plan.size
        made = Model(
            id=service.name,
            created=service.started,
            width=width,
            height=height,
            fps=plan.section.fps,
            chunk_frames=len(plan.chunking.frames(1)),
            max_seconds=service.limits.seconds,
        )
        return ModelList(data=[made])

    @api.post("/files")
    async def upload(owner: Owner, file: UploadFile) -> File:
        """Keep an image, for a video's first frame: PNG, JPEG or WebP."""
        data = await file.read(service.limits.image_bytes + 1)
        image = await asyncio.to_thread(service.images.decode, data)
        id = service.images.keep(owner, image)
        return File(id=id, bytes=len(data), created_at=int(time.time()))

    @api.post("/sessions", status_code=201)
    async def begin(owner: Owner, request: SessionRequest) -> Session:
        """Open a session without a connection; there is no queue."""

        async def tell(message: SessionQueued) -> None:
            raise Full("sessions: there is no room; come back later", message.estimate_s)

        entry, token = await service.begin(owner, request, tell)
        return Session(
            id=entry.live.terms.id,
            resume_token=token,
            ws="/v1/realtime/video",
            expires_s=service.limits.expires,
        )

    @api.get("/sessions/{id}")
    async def session(owner: Owner, id: str) -> SessionState:
        """How far a session is."""
        return _state(entry_of(owner, id))

    @api.delete("/sessions/{id}")
    async def stop(owner: Owner, id: str) -> SessionState:
        """End a session; its client still gets what is made."""
        entry = entry_of(owner, id)
        await service.sessions.end(entry, "stopped")
        return _state(entry)

    @api.get(
        "/sessions/{id}/state",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": {}}}},
    )
    async def state(owner: Owner, id: str) -> Response:
        """A session's state between two chunks, as ``lltk stream --resume`` takes it."""
        data = await service.sessions.state(entry_of(owner, id))
        return Response(data, media_type="application/octet-stream")

    return api


def _state(entry: Entry) -> SessionState:
    live = entry.live
    return SessionState(
        id=live.terms.id,
        state=entry.state,
        connected=entry.connection is not None,
        chunks=live.chunks,
        remaining_s=max(live.remaining, 0.0),
    )
