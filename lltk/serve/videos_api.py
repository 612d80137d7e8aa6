"""The routes of video jobs."""

import asyncio
import json
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from torch import Tensor

from lltk.serve.answers import REFUSALS, asking, refusal, routes, when_ready
from lltk.serve.realtime import explained
from lltk.serve.security import Tokens
from lltk.serve.service import Service
from lltk.serve.videos import Video, VideoDeleted, VideoList, VideoRequest

_JSON, _FORM = "application/json", "multipart/form-data"
_SEED = re.compile(r"[0-9]{1,19}")
_FIELDS = ("prompt", "model", "seconds", "size", "seed")


def videos_api(service: Service, tokens: Tokens) -> APIRouter:
    """The routes of a service.

    Args:
        service: what is served.
        tokens: that clients need.
    """
    ready = [Depends(when_ready(service))]
    api = APIRouter(
        prefix="/v1/videos", responses=REFUSALS, dependencies=ready, route_class=routes(tokens)
    )
    Owner = Annotated[str, Depends(asking(tokens))]

    def video_of(owner: str, id: str) -> Video:
        video = service.jobs.find(owner, id)
        if video is None:
            raise refusal(404, "not_found", "video: there is none of this id")
        return video

    @api.post("", openapi_extra={"requestBody": _body()})
    async def create(owner: Owner, request: Request) -> Video:
        """Queue a video."""
        wanted, sent = await _read(service, request)
        named = await service.check(owner, wanted.model, wanted.size, wanted.input_reference)
        image = sent if named is None else named
        return service.jobs.create(owner, wanted.script, wanted.seed, image)

    @api.get("")
    async def videos(
        owner: Owner,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """The jobs, a page of them."""
        every = service.jobs.of(owner)
        if order == "desc":
            every.reverse()
        if after is not None:
            places = [place for place, video in enumerate(every) if video.id == after]
            if not places:
                raise refusal(404, "not_found", "after: there is no video of this id")
            every = every[places[0] + 1 :]
        page = every[:limit]
        return VideoList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(every) > limit,
        )

    @api.get("/{id}")
    async def video(owner: Owner, id: str) -> Video:
        """A job."""
        return video_of(owner, id)

    @api.get(
        "/{id}/content",
        response_class=FileResponse,
        responses={200: {"content": {"video/mp4": {}, "image/webp": {}}}},
    )
    async def content(
        owner: Owner, id: str, variant: Literal["video", "thumbnail"] = "video"
    ) -> FileResponse:
        """The file of a job that is completed."""
        if video_of(owner, id).status != "completed":
            raise refusal(409, "not_completed", "video: is not completed; ask again later")
        path = service.jobs.content(id, variant == "thumbnail")
        return FileResponse(
            path, media_type="image/webp" if variant == "thumbnail" else "video/mp4"
        )

    @api.delete("/{id}")
    async def delete(owner: Owner, id: str) -> VideoDeleted:
        """Forget a job, also while it is made."""
        video_of(owner, id)
        service.jobs.delete(owner, id)
        return VideoDeleted(id=id)

    return api


def _body() -> dict[str, Any]:
    """For OpenAPI: what `_read` takes."""
    schema = VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs")
    fields: dict[str, Any] = {name: {"type": "string"} for name in _FIELDS}
    fields["input_reference"] = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": fields, "required": ["prompt"]}
    return {"required": True, "content": {_JSON: {"schema": schema}, _FORM: {"schema": form}}}


async def _read(service: Service, request: Request) -> tuple[VideoRequest, Tensor | None]:
    """What a request for a video says, in JSON or as a form, and the image that a form holds."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _JSON:
        return _checked(await request.body()), None
    if kind != _FORM:
        raise refusal(415, "invalid_request", f"body: send {_JSON} or {_FORM}")
    given: dict[str, Any] = {}
    image = None
    async with request.form(max_files=1, max_fields=16) as form:
        for key, value in form.multi_items():
            if isinstance(value, UploadFile) and key == "input_reference":
                data = await value.read(service.limits.image_bytes + 1)
                image = await asyncio.to_thread(service.images.decode, data)
            elif isinstance(value, UploadFile):
                raise refusal(422, "invalid_request", f"{key}: is no file")
            elif key not in _FIELDS:
                raise refusal(422, "invalid_request", f"{key}: a form has no such field")
            else:
                given[key] = int(value) if key == "seed" and _SEED.fullmatch(value) else value
    return _checked(json.dumps(given).encode()), image


def _checked(data: bytes) -> VideoRequest:
    try:
        return VideoRequest.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise refusal(422, "invalid_request", explained(error)) from error
