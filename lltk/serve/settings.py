"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        sessions: live sessions that may be open at once.
        queue: sessions that may wait for room.
        per_token: sessions of one token, open or waiting.
        seconds: of video of a live session, or of a job.
        expires: seconds for which a session without a connection keeps its memory, and a paused one
            that others wait for.
        kept: seconds for which a session that left its memory can be resumed from disk.
        ring: seconds of video that are kept for a client that comes back.
        jobs: that may wait.
        finished: jobs whose videos are kept; the oldest go first.
        image_bytes, image_pixels: of an uploaded image.
        images: that are kept at once; the oldest go first.
    """

    sessions: int = 4
    queue: int = 8
    per_token: int = 4
    seconds: float = 600.0
    expires: float = 60.0
    kept: float = 3600.0
    ring: float = 10.0
    jobs: int = 32
    finished: int = 100
    image_bytes: int = 10 << 20
    image_pixels: int = 16 << 20
    images: int = 16
