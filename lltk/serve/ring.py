"""The newest part of a live video, kept for clients that come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from lltk.serve.messages import ChunkMetadata, VideoStart


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a player needs before the parts of one encoder.

    Attributes:
        message: goes before the init segment.
        init: the init segment.
    """

    message: VideoStart
    init: bytes


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive frames of a live video.

    Attributes:
        beginning: of the encoder that made them.
        message: goes before the fragments.
        data: the fragments.
    """

    beginning: Beginning
    message: ChunkMetadata
    data: bytes


class Ring:
    """The parts of at least the last `frames` frames; any thread may use it.

    Args:
        frames: how many are kept.
        parts: to begin with.
    """

    def __init__(self, frames: int, parts: Sequence[Part] = ()) -> None:
        self._frames = frames
        self._parts = deque(parts)
        self._lock = Lock()

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that are kept, oldest first."""
        with self._lock:
            return tuple(self._parts)

    def add(self, part: Part) -> None:
        """Keep a part, and drop those that are old enough."""
        with self._lock:
            self._parts.append(part)
            end = part.message.first_frame + part.message.num_frames
            while len(self._parts) > 1 and end - self._parts[1].message.first_frame >= self._frames:
                self._parts.popleft()

    def after(self, sequence: int) -> Part | None:
        """The part that follows one; where it is lost, the newest that begins with a keyframe.

        Args:
            sequence: of the part before; −1 for the video's begin.

        Returns:
            None if that is the newest.
        """
        with self._lock:
            if not self._parts or self._parts[-1].message.sequence <= sequence:
                return None
            first = self._parts[0].message.sequence
            if sequence + 1 >= first:
                return self._parts[sequence + 1 - first]
            return next(part for part in reversed(self._parts) if part.message.keyframe)
