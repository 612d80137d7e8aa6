"""Signals that ask a command to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME = 1.0
"""Seconds within which a signal is the same as the first.

torchrun passes on to its ranks what a terminal gives them too.
"""


class Stopping:
    """Whether a signal has asked to stop: SIGINT, SIGTERM or SIGHUP.

    The first one only asks. A second one ends the process at once, or, while a state is kept, as
    soon as it is: what is written whole is never lost.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether to stop."""
        self._first = 0.0
        self._keeping = False
        self._late: int | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Let a second signal wait for the end of the block."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False
            if self._late is not None:
                _end(self._late)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first = True, now
        elif now - self._first > _SAME:
            if not self._keeping:
                _end(number)
            self._late = number


@contextmanager
def stopping() -> Iterator[Stopping]:
    """Have signals ask the block to stop."""
    made = Stopping()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, made.note) for number in numbers}
    try:
        yield made
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int) -> None:
    """End this process as a shell tells of a signal, without waiting for threads."""
    os._exit(128 + number)
