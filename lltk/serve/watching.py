"""A client that watches a live stream at the pace at which it plays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from lltk.serve.messages import (
    FROM_SERVER,
    PROTOCOL,
    TOKEN,
    ChunkMetadata,
    ClientPlayback,
    Error,
    SessionDone,
    SessionStart,
    VideoConfig,
    VideoStart,
)
from lltk.serve.security import check_tokens

_REPORT = 0.25
"""Seconds between two reports of where the player would be."""


@dataclass(frozen=True)
class Piece:
    """A binary message: the init segment, or a part of the video.

    Attributes:
        data: the message.
        metadata: the part's; None for the init segment.
        buffered: seconds of video that a player would have beyond what it has played.
    """

    data: bytes
    metadata: ChunkMetadata | None
    buffered: float


def watch(
    url: str, token: str | None, prompt: str, seed: int | None, seconds: float | None
) -> Iterator[Piece]:
    """Start a stream and take it, to its end.

    Args:
        url: of the server.
        token: the server's; None for none.
        prompt, seed, seconds: of the stream; see `SessionStart`.

    Raises:
        ValueError: the server refuses it, or the token is none.
        OSError: it cannot be reached, or the connection is lost.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"url: {url} is no server's; write it as http://HOST:PORT")
    check_tokens([] if token is None else [token])
    secure = "s" if parts.scheme == "https" else ""
    place = f"ws{secure}://{parts.netloc}{parts.path.rstrip('/')}/v1/realtime/video"
    names = [PROTOCOL] if token is None else [PROTOCOL, TOKEN + token]
    start = SessionStart(type="session.start", prompt=prompt, seed=seed, max_seconds=seconds)
    try:
        with connect(place, subprotocols=names, max_size=None) as socket:  # type: ignore[arg-type]
            with suppress(ConnectionClosed):  # what was said before is still to be read
                socket.send(start.model_dump_json(exclude_none=True))
            config: VideoConfig | None = None
            metadata: ChunkMetadata | None = None
            begun, end = 0.0, 0.0
            while True:
                try:
                    given = socket.recv(timeout=_REPORT)
                except TimeoutError:
                    given = None
                position = min(time.monotonic() - begun, end) if begun else 0.0
                if isinstance(given, bytes):
                    if metadata is not None and config is not None:
                        begun = begun or time.monotonic()
                        end = (metadata.first_frame + metadata.num_frames) / config.fps
                    yield Piece(given, metadata, end - position)
                elif given is not None:
                    message = FROM_SERVER.validate_json(given)
                    if isinstance(message, Error):
                        raise ValueError(f"{message.code}: {message.message}")
                    if isinstance(message, SessionDone):
                        return
                    if isinstance(message, VideoStart):
                        config = message.config
                    metadata = message if isinstance(message, ChunkMetadata) else metadata
                if begun:
                    report = ClientPlayback(
                        type="client.playback", position=position, buffered=end - position
                    )
                    with suppress(ConnectionClosed):
                        socket.send(report.model_dump_json())
    except (ConnectionClosed, InvalidStatus) as error:
        raise OSError(5, f"{url}: the connection is lost ({error})") from error
