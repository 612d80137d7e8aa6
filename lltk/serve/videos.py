"""Video jobs as clients see them: ``/v1/videos``, in the form that the field keeps."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from lltk.serve.messages import ImageReference, Message, Prompt, Shots
from lltk.stream.script import LONGEST_SHOT, Shot, single_shot

_NUMBER = re.compile(r"\d{1,4}(\.\d{1,3})?")


def _is_length(seconds: str | float) -> str | float:
    if isinstance(seconds, str) and not _NUMBER.fullmatch(seconds):
        raise ValueError("seconds: is no number; write one, such as 4")
    if not 0 < float(seconds) <= LONGEST_SHOT:
        raise ValueError(f"seconds: write more than 0 and at most {LONGEST_SHOT:g}")
    return seconds


class VideoRequest(Message):
    """What a video shows: a prompt for some seconds, or shots.

    Attributes:
        prompt: what it shows.
        model: the served model's name, as ``/v1/models`` has it.
        seconds: its length, as a number or a number in a string.
        size: ``WIDTHxHEIGHT``, which has to be the recipe's.
        input_reference: the first frame.
        seed: of the noise; None for the recipe's.
        shots: a script in place of prompt and seconds.
    """

    prompt: Prompt | None = None
    model: str | None = Field(None, max_length=256)
    seconds: Annotated[str | float | None, AfterValidator(lambda s: s and _is_length(s))] = None
    size: str | None = Field(None, pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")
    input_reference: ImageReference | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    shots: Shots | None = None

    @model_validator(mode="after")
    def _shows_something(self) -> VideoRequest:
        if (self.prompt is None) == (self.shots is None):
            raise ValueError("video: give exactly one of prompt and shots")
        if self.shots is not None and self.seconds is not None:
            raise ValueError("video: shots have their own seconds; drop the video's")
        return self

    @property
    def script(self) -> tuple[Shot, ...]:
        """The shots that it shows."""
        return self.shots or single_shot(self.prompt or "", float(self.seconds or 4))


Status = Literal["queued", "in_progress", "completed", "failed"]


class VideoError(Message):
    """Why a job failed."""

    code: str
    message: str


class Video(Message):
    """A job.

    Attributes:
        id: names it.
        object: what this is.
        status: how far it is.
        progress: per cent.
        model: that makes it.
        prompt: what it shows, all captions of a script.
        seconds: its length.
        size: ``WIDTHxHEIGHT``.
        created_at, completed_at, expires_at: seconds since 1970; None if not yet, or never.
        error: why it failed.
        remixed_from_video_id: always None.
    """

    id: str
    object: Literal["video"] = "video"
    status: Status = "queued"
    progress: int = 0
    model: str
    prompt: str
    seconds: str
    size: str
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    error: VideoError | None = None
    remixed_from_video_id: None = None


class VideoList(Message):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(Message):
    """A job that is no more."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True
