"""Who makes the next chunk, and how many there is time for.

A device makes whole chunks, one at a time. The chunk that is needed first is made first: that of
the session whose viewer runs out of video soonest. A session whose viewer has more than a chunk
ahead of him is not asked, so it costs nothing while its viewer is paused, slow or away. Where a
chunk takes longer to make than to play, its viewer has that much ahead of him instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeVar

REPORT = 1.0
"""Seconds between two reports of a player."""
_SPARE = 1.25
"""How much longer than the newest chunk the next one may take, without its viewer waiting."""
_NEWEST = 0.2
"""How much the newest chunk weighs in what frames cost."""
Key = TypeVar("Key")


@dataclass(frozen=True)
class Playhead:
    """Where a player was when it last said so.

    Between two reports it is taken to play on, through what it has buffered. A player that reports
    no more is taken to have stopped.

    Attributes:
        position: seconds of the video that had played.
        buffered: seconds that it has beyond them, with those that came since.
        reported: when, in seconds of a monotonic clock; inf if never.
    """

    position: float = 0.0
    buffered: float = 0.0
    reported: float = math.inf

    @property
    def _farthest(self) -> float:
        """Seconds that it may have gone on since."""
        return min(self.buffered, REPORT)

    def at(self, now: float) -> float:
        """Seconds of the video that have played."""
        return self.position + min(max(now - self.reported, 0.0), self._farthest)

    def reaches(self, position: float) -> float:
        """When it has played so much: −inf if it had, inf if only another report can tell."""
        left = position - self.position
        if left <= 0:
            return -math.inf
        return self.reported + left if left <= self._farthest else math.inf


@dataclass(frozen=True)
class Demand:
    """What a session, or a job, asks of the device.

    Attributes:
        made: seconds of video that are made.
        ahead: seconds of video that its viewer may have ahead of him as a chunk begins.
        playhead: its viewer's; None for a job, which nobody watches.
    """

    made: float
    ahead: float
    playhead: Playhead | None = None

    def due(self) -> float:
        """When its next chunk may begin; inf if only another report can tell."""
        if self.playhead is None:
            return -math.inf
        return self.playhead.reaches(self.made - self.ahead)

    def deadline(self, now: float) -> float:
        """When its viewer has seen all that is made; inf for a job."""
        if self.playhead is None:
            return math.inf
        return now + self.made - self.playhead.at(now)


def ahead(chunk: float, making: float) -> float:
    """See `Demand.ahead`: a chunk, or what plays while one is made, whichever is more.

    Args:
        chunk: seconds of video of a chunk.
        making: seconds from when the newest chunk began until it was sent.
    """
    return max(chunk, _SPARE * making)


def choose(demands: Sequence[tuple[Key, Demand]], now: float) -> tuple[Key | None, float]:
    """The one whose chunk is made next: of those that are due, the one with the earliest deadline.

    Args:
        demands: in the order of their arrival, which decides between equal deadlines.
        now: seconds of the clock that playheads were reported by.

    Returns:
        Its key, or None and the seconds until one is due, inf if none will be by itself.
    """
    due = [(demand.deadline(now), key) for key, demand in demands if demand.due() <= now]
    if due:
        return min(due, key=itemgetter(0))[1], 0.0
    return None, min((demand.due() - now for _, demand in demands), default=math.inf)


class Capacity:
    """How many sessions there is time for, by what frames are measured to cost."""

    def __init__(self) -> None:
        self.frame = 0.0
        """Seconds that a frame takes, of the stage that takes longest; 0 before the first."""

    def measure(self, stages: Iterable[float], frames: int) -> None:
        """Take in a chunk.

        Args:
            stages: seconds of each stage; they overlap with one another's.
            frames: of the chunk.
        """
        new = max(stages) / frames
        self.frame = new if not self.frame else self.frame + _NEWEST * (new - self.frame)

    def share(self, fps: float) -> float:
        """The share of the time that a session of so many frames a second takes."""
        return fps * self.frame

    def fits(self, sessions: int, fps: float) -> bool:
        """Whether one more session fits beside those that play; the first one always does."""
        return sessions == 0 or (sessions + 1) * self.share(fps) <= 1
