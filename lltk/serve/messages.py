"""What a client and the server say to each other over ``WS /v1/realtime/video``.

Text messages are JSON, each of one of the models below, told apart by ``type``. Binary messages go
to the client alone: the first after each `VideoStart` is the MP4's init segment, and after each
`ChunkMetadata` there is one with the fragments of its frames. The first message of a client is
`SessionStart` or `SessionResume`.

A client names the protocol's version and its token as WebSocket subprotocols: `PROTOCOL`, and
`TOKEN` followed by the token. The server answers with `PROTOCOL`.

The connection closes with one of the numbers of `Close`, after an `Error` that says why.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from lltk.stream.script import LONGEST_SHOT, Shot

PROTOCOL = "lltk.v1"
"""The subprotocol that both sides speak."""
TOKEN = "lltk.token."
"""What precedes the token in its subprotocol."""
LONGEST_PROMPT = 2000
"""Characters."""
SHOT_SECONDS = 5.0
"""Of a shot that has no length of its own; a stream's last shot goes on."""
MOST_SHOTS = 64
"""Shots of a message."""
LONGEST_TEXT = 1 << 16
"""Bytes of a client's message."""


class Close(IntEnum):
    """Why the server closes a connection (RFC 6455)."""

    DONE = 1000
    SHUTDOWN = 1001
    """The server stops; sessions are kept, to be resumed when it is back."""
    PROTOCOL = 1002
    """The client speaks another version."""
    BINARY = 1003
    """The client sent a binary message."""
    POLICY = 1008
    """The token is wrong, or the messages are."""
    TOO_LARGE = 1009
    INTERNAL = 1011
    LATER = 1013
    """There is no room; `Error.retry_after` says when there may be."""


class Message(BaseModel):
    """A part of a message: unknown keys, nan and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Prompt = Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT, pattern=r"\S")]
Identifier = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.:-]+$")]


class LiveShot(Shot):
    """A shot of a script: ``caption``, ``seconds`` and ``cut``."""

    caption: Prompt


Shots = Annotated[tuple[LiveShot, ...], Field(min_length=1, max_length=MOST_SHOTS)]


class ImageReference(Message):
    """The video's first frame: exactly one of the two.

    Attributes:
        file_id: of an image that ``POST /v1/files`` has taken.
        image_url: the image itself, as a ``data:image/png;base64,`` URL (or JPEG or WebP). No other
            URL is fetched.
    """

    file_id: Identifier | None = None
    image_url: Annotated[str, Field(pattern="^data:")] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> ImageReference:
        if (self.file_id is None) == (self.image_url is None):
            raise ValueError("image: give exactly one of file_id and image_url")
        return self


# From the client


class SessionStart(Message):
    """Begin a stream. It goes on past its last shot until `max_seconds`, or the server's limit.

    Attributes:
        model: the served model's name, as ``/v1/models`` has it.
        prompt: what it shows; or `shots`.
        shots: a script; exactly one of the two.
        seed: of the noise; None for the recipe's.
        size: ``WIDTHxHEIGHT``, which has to be the recipe's.
        image_reference: the first frame.
        recache: whether prompt switches renew the cache; None as the recipe says.
        max_seconds: of video; None for the server's limit.
    """

    type: Literal["session.start"]
    model: str | None = Field(default=None, max_length=256)
    prompt: Prompt | None = None
    shots: Shots | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    size: str | None = Field(default=None, pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")
    image_reference: ImageReference | None = None
    recache: bool | None = None
    max_seconds: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _shows_something(self) -> SessionStart:
        if (self.prompt is None) == (self.shots is None):
            raise ValueError("session.start: give exactly one of prompt and shots")
        return self


class SessionResume(Message):
    """Go on with a session whose connection was lost.

    Attributes:
        session_id, resume_token: of `SessionCreated`.
        after_sequence: the last `ChunkMetadata.sequence` whose binary message has come; −1 for
            none.
    """

    type: Literal["session.resume"]
    session_id: Identifier
    resume_token: str = Field(max_length=128)
    after_sequence: int = Field(-1, ge=-1)


class Event(Message):
    """What changes: exactly one of `prompt` and `append`.

    Attributes:
        prompt: what the video shows from here on.
        cut: whether a scene cut comes first; if not, only the prompt is switched.
        seconds: with a cut, how long the new shot lasts if others follow; None for `SHOT_SECONDS`.
        recache: whether a switch renews the cache; None as the session's.
        append: shots that follow when all others are over.
    """

    prompt: Prompt | None = None
    cut: bool = False
    seconds: float | None = Field(None, gt=0, le=LONGEST_SHOT)
    recache: bool | None = None
    append: Shots | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Event:
        if (self.prompt is None) == (self.append is None):
            raise ValueError("event: give exactly one of prompt and append")
        if self.append is not None and (self.cut or self.recache is not None):
            raise ValueError("event: cut and recache are for a prompt; drop them")
        if self.seconds is not None and not self.cut:
            raise ValueError("event: seconds are for a cut; drop them")
        if self.cut and self.recache is not None:
            raise ValueError("event: recache is for a switch without a cut; drop it")
        return self


class Interaction(Message):
    """An event, and the name by which it is acknowledged."""

    event_id: Identifier
    event: Event


class SessionInteraction(Message):
    """Change the stream; acknowledged by `InteractionQueued`, or refused by an `Error`.

    A client that has not heard of it sends it again, with the same `event_id`: it is acknowledged
    again and applied once.
    """

    type: Literal["session.interaction"]
    interaction: Interaction


class SessionPause(Message):
    """Begin no chunk until `SessionPlay`; acknowledged if it has an `event_id`."""

    type: Literal["session.pause"]
    event_id: Identifier | None = None


class SessionPlay(Message):
    """End a pause; acknowledged if it has an `event_id`."""

    type: Literal["session.play"]
    event_id: Identifier | None = None


class SessionStop(Message):
    """End the session; answered by `SessionDone`."""

    type: Literal["session.stop"]


class SessionPing(Message):
    """Answered by `SessionPong`."""

    type: Literal["session.ping"]


class ClientPlayback(Message):
    """Where the player is, each second: a session is made at most one chunk ahead of it.

    Where a chunk takes longer to make than to play, it is made that much ahead instead.

    Attributes:
        position: seconds of the video that have played.
        buffered: seconds of video that the player has beyond them.
    """

    type: Literal["client.playback"]
    position: float = Field(ge=0)
    buffered: float = Field(ge=0)


FromClient = Annotated[
    SessionStart
    | SessionResume
    | SessionInteraction
    | SessionPause
    | SessionPlay
    | SessionStop
    | SessionPing
    | ClientPlayback,
    Field(discriminator="type"),
]
FROM_CLIENT: TypeAdapter[FromClient] = TypeAdapter(FromClient)
"""Checks a client's message, strictly: ``FROM_CLIENT.validate_json(text, strict=True)``."""


# From the server


class SessionQueued(Message):
    """The session waits for room; sent again whenever its place changes.

    Attributes:
        position: its place, from 1.
        length: of the queue.
        estimate_s: seconds until there is room at the latest, if nobody resumes.
    """

    type: Literal["session.queued"] = "session.queued"
    position: int
    length: int
    estimate_s: float


class SessionCreated(Message):
    """The session is there.

    Attributes:
        session_id, resume_token: for `SessionResume`.
        expires_s: seconds after a lost connection for which it can be resumed.
    """

    type: Literal["session.created"] = "session.created"
    session_id: str
    resume_token: str
    expires_s: float


class VideoConfig(Message):
    """What the video is.

    Attributes:
        width, height: pixels.
        fps: frames a second.
        chunk_frames: frames of every chunk but the first, which may have fewer.
        first_frame: the frame at which this MP4's timestamps begin with 0. It is above 0 where a
            restarted server goes on with a session; a player then adds ``first_frame / fps``
            (`SourceBuffer.timestampOffset`).
    """

    width: int
    height: int
    fps: float
    chunk_frames: int
    first_frame: int = 0


class VideoStart(Message):
    """An MP4 begins; the next binary message is its init segment.

    Attributes:
        request_id: the session's.
        mime: such as ``video/mp4; codecs="avc1.64001f"``.
        config: what the video is.
    """

    type: Literal["video.start"] = "video.start"
    request_id: str
    mime: str
    config: VideoConfig


class InteractionQueued(Message):
    """An event was received.

    Attributes:
        event_id: the client's.
        event: ``switch``, ``cut``, ``append``, ``pause`` or ``play``.
        received: the first chunk that had not begun when it came.
    """

    type: Literal["session.interaction.queued"] = "session.interaction.queued"
    event_id: str
    event: str
    received: int


class Seconds(Message):
    """Where the time of the latest finished chunk went; `wait` is until it was its turn."""

    step: float = 0.0
    commit: float = 0.0
    text: float = 0.0
    decode: float = 0.0
    wait: float = 0.0


class ChunkMetadata(Message):
    """A chunk, or a part of one; the next binary message has its frames.

    Attributes:
        sequence: counts a session's parts from 0.
        generation_chunk_index: the chunk.
        first_frame: the part's first frame, counted from the video's begin.
        num_frames: how many frames it has.
        keyframe: whether it begins with one.
        byte_length: of the binary message.
        started_event_ids: events that are visible from `first_frame` on: they act from this chunk.
        seconds: where the time went.
    """

    type: Literal["video.chunk_metadata"] = "video.chunk_metadata"
    sequence: int
    generation_chunk_index: int
    first_frame: int
    num_frames: int
    keyframe: bool
    byte_length: int
    started_event_ids: tuple[str, ...] = ()
    seconds: Seconds = Seconds()


class SessionDone(Message):
    """The session is over.

    Attributes:
        chunks: how many were made.
        reason: ``stopped`` by the client, or ``limit``: as long as it may be.
    """

    type: Literal["session.done"] = "session.done"
    chunks: int
    reason: Literal["stopped", "limit"]


Code = Literal[
    "unauthorized",
    "protocol_version",
    "invalid_message",
    "too_large",
    "refused",
    "not_found",
    "taken_over",
    "over_capacity",
    "shutdown",
    "internal",
]


class Error(Message):
    """Something is refused, or failed.

    Attributes:
        code: what kind of error, for a program.
        message: says what to change, for people.
        retryable: whether the same may go well later.
        event_id: of the event that is refused; the stream goes on.
        retry_after: seconds after which to come back.
    """

    type: Literal["error"] = "error"
    code: Code
    message: str
    retryable: bool = False
    event_id: str | None = None
    retry_after: float | None = None


class SessionPong(Message):
    """Answers `SessionPing`."""

    type: Literal["session.pong"] = "session.pong"


FromServer = Annotated[
    SessionQueued
    | SessionCreated
    | VideoStart
    | InteractionQueued
    | ChunkMetadata
    | SessionDone
    | Error
    | SessionPong,
    Field(discriminator="type"),
]
FROM_SERVER: TypeAdapter[FromServer] = TypeAdapter(FromServer)
"""Reads a server's message."""
