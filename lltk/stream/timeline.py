"""A session's script while it runs: the chunks to come, and the events that change them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Condition

from lltk.stream.chunks import Chunk, Chunking, Receipt
from lltk.stream.script import Shot, single_shot


@dataclass(frozen=True)
class TimelineState:
    """A timeline between two chunks.

    Attributes:
        chunks: those that are still to be made, with the events that wait for them.
        last: the chunk that was made last; None before the first.
        events: how many events there were.
    """

    chunks: tuple[Chunk, ...]
    last: Chunk | None
    events: int

    @property
    def index(self) -> int:
        """Index of the next chunk."""
        return _following(self.last)


class Timeline:
    """The chunks of one session that are still to be made; any thread may change them.

    An event acts from the first chunk that has not begun when it comes. Its receipt says which
    that is, and the chunk from which it acts carries the receipt. The shot of the chunk in flight,
    or between chunks of the one made last, is the running shot; before the first chunk it is the
    first shot. After a cut it is the cut's shot, although that has not begun. When the script is
    over, `append` and `cut` make it go on.

    Args:
        chunking: how shots become chunks.
        script: the shots to begin with; there may be none yet.
        endless: whether the last shot goes on until other shots follow.
    """

    def __init__(
        self, chunking: Chunking, script: Sequence[Shot] = (), endless: bool = False
    ) -> None:
        self._chunking = chunking
        self._endless = endless
        self._chunks = chunking.chunks(script)
        self._last: Chunk | None = None
        self._in_flight = False  # if so, it is the first of the chunks
        self._paused = False
        self._closed = False
        self._events = 0
        self._changed = Condition()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks that are still to be made, the one in flight included.

        An endless script's last shot has one more than these whenever they are made.
        """
        with self._changed:
            return tuple(self._chunks)

    @property
    def index(self) -> int:
        """Index of the chunk in flight, or else of the next one: how many chunks are made."""
        with self._changed:
            return _following(self._last)

    @property
    def prompts(self) -> list[str]:
        """The different prompts of the chunks to come, in their order: what to encode next."""
        with self._changed:
            every = [*self._chunks, *self._going_on()]
        return list(dict.fromkeys(chunk.prompt for chunk in every))

    @property
    def state(self) -> TimelineState:
        """All it knows between two chunks; a pause is not kept."""
        with self._changed:
            return TimelineState(tuple(self._chunks), self._last, self._events)

    def restore(self, state: TimelineState) -> None:
        """Go on from a `state` of the same chunking."""
        with self._changed:
            self._chunks, self._last = list(state.chunks), state.last
            self._events = state.events
            self._changed.notify_all()

    # Events

    def switch(self, prompt: str, recache: bool | None = None) -> Receipt:
        """Show something else for the rest of the running shot.

        Args:
            prompt: the text to encode, as it stands; only the scene-cut prefix precedes it where a
                cut has not begun.
            recache: whether to commit held chunks again under the prompt, from their clean latents,
                oldest first, except sinks; None as the chunking says.

        Raises:
            ValueError: the prompt is empty, or every chunk of the running shot has begun.
        """
        if not prompt.strip():
            raise ValueError("switch: the prompt is empty; say what the video shows from here on")
        recache = self._chunking.recache if recache is None else recache
        with self._changed:
            rest, later = self._ahead()
            if not later:
                rest = rest or self._going_on()
            if not rest:
                raise ValueError(
                    "switch: no chunk of the running shot is left that could show it; cut to a "
                    "new shot, or append one"
                )
            receipt = self._receipt("switch")
            rest = [self._chunking.switched(chunk, prompt) for chunk in rest]
            recache &= not rest[0].opens_shot
            rest[0] = replace(rest[0], recache=recache, receipts=(*rest[0].receipts, receipt))
            self._follow([*rest, *later])
        return receipt

    def append(self, script: Sequence[Shot]) -> Receipt:
        """Show more shots after all others.

        Raises:
            ValueError: there are no shots.
        """
        if not script:
            raise ValueError("append: no shots are given; give at least one")
        with self._changed:
            receipt = self._receipt("append")
            before = self._chunks[-1] if self._chunks else self._last
            self._chunks += _receipted(self._chunking.chunks(script, before), (receipt,))
            self._changed.notify_all()
        return receipt

    def cut(self, caption: str, seconds: float) -> Receipt:
        """End the running shot and show a new one, after a scene cut; the shots after it follow.

        Args:
            caption: what the new shot shows.
            seconds: its length, in seconds of video.

        Raises:
            ValueError: the caption is empty, or the length does not fit.
        """
        script = single_shot(caption, seconds, "cut")
        with self._changed:
            dropped, later = self._ahead()
            receipt = self._receipt("cut")
            overtaken = [old for chunk in dropped for old in chunk.receipts]
            before = self._chunks[0] if self._in_flight else self._last
            new = _receipted(self._chunking.chunks(script, before), (*overtaken, receipt))
            self._follow([*new, *self._chunking.renumbered(later, new[-1])])
        return receipt

    def pause(self) -> Receipt:
        """Begin no chunk until `play`; the chunk in flight is made."""
        return self._hold("pause", True)

    def play(self) -> Receipt:
        """End a pause."""
        return self._hold("play", False)

    # What the session asks for

    @contextmanager
    def next(self) -> Iterator[Chunk | None]:
        """The next chunk, for the block that makes it.

        It is None during a pause, and when the script is over. Where the block raises, the chunk is
        still to be made, and events act on it again.

        Raises:
            ValueError: another chunk is being made.
        """
        with self._changed:
            if self._in_flight:
                raise ValueError(
                    "stream: another thread is making a chunk of it; iterate from one at a time"
                )
            ready = not self._paused and self._has_next()
            if ready and not self._chunks:
                self._chunks = self._going_on()
            self._in_flight = ready
            chunk = _applied(self._chunks[0]) if ready else None
        made = False
        try:
            yield chunk
            made = ready
        finally:
            with self._changed:
                self._in_flight = False
                if made:
                    del self._chunks[0]
                    self._last = chunk

    def wait(self) -> bool:
        """Wait for the end of a pause; whether there is a chunk to be made."""
        with self._changed:
            self._changed.wait_for(lambda: not self._paused or not self._has_next() or self._closed)
            return self._has_next() and not (self._paused and self._closed)

    def close(self) -> None:
        """Let nobody wait for the end of a pause any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # With the lock held

    def _going_on(self) -> list[Chunk]:
        """The chunk that an endless script has behind all others; none before the first."""
        before = self._chunks[-1] if self._chunks else self._last
        return [self._chunking.going_on(before)] if self._endless and before else []

    def _has_next(self) -> bool:
        """Whether there is a chunk to be made."""
        return bool(self._chunks or self._going_on())

    def _ahead(self) -> tuple[list[Chunk], list[Chunk]]:
        """The chunks that have not begun: the running shot's, and those of later shots."""
        running = self._chunks[0] if self._in_flight else self._last
        ahead = self._chunks[self._in_flight :]
        if ahead and (running is None or any(each.event == "cut" for each in ahead[0].receipts)):
            running = ahead[0]
        own = [chunk for chunk in ahead if running and chunk.shot == running.shot]
        return own, ahead[len(own) :]

    def _follow(self, ahead: Sequence[Chunk]) -> None:
        """Let these chunks follow the one in flight."""
        self._chunks[self._in_flight :] = ahead
        self._changed.notify_all()

    def _receipt(self, event: str, applied: bool = False) -> Receipt:
        begun = _following(self._last) + self._in_flight
        self._events += 1
        return Receipt(self._events - 1, event, begun, begun if applied else None)

    def _hold(self, event: str, paused: bool) -> Receipt:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()
            return self._receipt(event, applied=True)


def _following(last: Chunk | None) -> int:
    """Index of the chunk after one; 0 if there is none before it."""
    return 0 if last is None else last.index + 1


def _receipted(chunks: Sequence[Chunk], receipts: tuple[Receipt, ...]) -> list[Chunk]:
    """The chunks, of which the first carries receipts."""
    return [replace(chunks[0], receipts=receipts), *chunks[1:]]


def _applied(chunk: Chunk) -> Chunk:
    """The chunk as it begins."""
    receipts = tuple(replace(receipt, applied=chunk.index) for receipt in chunk.receipts)
    return replace(chunk, receipts=receipts)
