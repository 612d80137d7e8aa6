"""A live stream: its session, the encoded video that a client takes, and the events it sends."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from torch import Tensor

from lltk.serve.messages import (
    MOST_SHOTS,
    SHOT_SECONDS,
    ChunkMetadata,
    Event,
    InteractionQueued,
    Seconds,
    VideoConfig,
    VideoStart,
)
from lltk.serve.metrics import Metrics
from lltk.serve.ring import Beginning, Part, Ring
from lltk.serve.scheduling import Demand, Playhead, ahead
from lltk.stream.chunks import Chunk, Receipt
from lltk.stream.fragments import FragmentWriter
from lltk.stream.report import ChunkReport
from lltk.stream.timeline import Timeline
from lltk.stream.video import pixels
from lltk.streaming import Plan, Stream

_REMEMBERED = 1000
"""Events of a session that are known again."""
_WAITING = 64
"""Events of a session that may wait to be visible."""


@dataclass(frozen=True)
class Terms:
    """What a session was begun with.

    Attributes:
        id: names it.
        owner: the digest of the token that began it.
        secret: the digest of its resume token.
        seconds: of video that it may have.
        recache: whether switches renew the cache; None as the recipe says.
    """

    id: str
    owner: str
    secret: str
    seconds: float
    recache: bool | None = None


@dataclass(frozen=True)
class Answered:
    """An event that was acknowledged.

    Attributes:
        asked: a digest of what it asked.
        answer: that it got.
    """

    asked: str
    answer: InteractionQueued


@dataclass
class Progress:
    """How far a session is, which its saved form keeps.

    Attributes:
        sequence: of the next part.
        paused: whether it makes no chunk until it is told to.
        events: the names that the client gave to events that are not visible yet, by receipt.
        answered: the newest events, by name, oldest first.
    """

    sequence: int = 0
    paused: bool = False
    events: dict[int, str] = field(default_factory=dict)
    answered: dict[str, Answered] = field(default_factory=dict)


class Live:
    """A session that is made while it is watched.

    The engine's thread calls `make`, the session's own threads `begun` and `deliver`, and the
    connection the rest; `changed` is called from any of them, whenever there is something new.

    Args:
        terms: what it was begun with.
        plan: of the stream.
        ring: for its parts.
        progress: how far it is.
        metrics: are told what its viewer sees.
        changed: must not block.
    """

    def __init__(
        self,
        terms: Terms,
        plan: Plan,
        ring: Ring,
        progress: Progress,
        metrics: Metrics,
        changed: Callable[[], object],
    ) -> None:
        self.terms = terms
        self.ring = ring
        self.progress = progress
        self._began = time.monotonic()
        self.paused_at = self._began
        """When it was paused, if it is."""
        self.failure: Exception | None = None
        self._plan = plan
        self._metrics = metrics
        self._changed = changed
        self._asked: dict[str, float] = {}
        """When events came that are not visible yet."""
        self._shown: deque[tuple[int, float]] = deque()
        """Frames from which events are visible that the viewer has not seen, and when they came."""
        self._limit = plan.section.fps * terms.seconds
        self._lock = Lock()
        self._chunks: deque[tuple[Chunk, float]] = deque()
        """Those that are not delivered, and when they began."""
        self._encoded = 0
        """How many frames of the first of these are encoded."""
        self._making = 0.0
        """Seconds from when the newest chunk began until it was delivered."""
        self._playhead = Playhead()
        self._seconds = Seconds()
        self._stream: Stream | None = None
        self._timeline: Timeline | None = None
        self._writer: FragmentWriter | None = None
        self.beginning: Beginning | None = None
        """What a player needs before the parts to come."""
        self._fragments: list[bytes] = []

    # For who opens and closes it

    def enter(self, stream: Stream) -> None:
        """Begin to work on an opened stream, whose sink is `deliver`."""
        plan = self._plan
        height, width = plan.size
        writer = FragmentWriter(
            self._fragments.append,
            height=height,
            width=width,
            fps=plan.section.fps,
            codec=plan.section.serve.codec,
            threads=plan.writer_threads,
        )
        config = VideoConfig(
            width=width,
            height=height,
            fps=plan.section.fps,
            chunk_frames=len(plan.chunking.frames(1)),
            first_frame=stream.session.delivery.frame,
        )
        mime = f'video/mp4; codecs="{writer.codec_string}"'
        message = VideoStart(request_id=self.terms.id, mime=mime, config=config)
        self.beginning = Beginning(message, b"".join(self._fragments))
        self._fragments.clear()
        self._writer, self._stream = writer, stream
        self._timeline = stream.session.timeline
        stream.__enter__()

    def leave(self) -> None:
        """Wait for the last frames, and let another session have the memory."""
        stream, writer = self.stream, self._writer
        self._stream = None
        assert writer is not None
        failure = self.failure
        try:
            stream.__exit__(None if failure is None else type(failure), failure, None)
        finally:
            writer.close()

    def save(self, path: Path) -> None:
        """Write what goes on from here, bit for bit; see `Stream.save`."""
        self.stream.save(path)

    @property
    def stream(self) -> Stream:
        """The stream that it works on.

        Raises:
            ValueError: it has left its memory.
        """
        if self._stream is None:
            raise ValueError("session: it is over; start another")
        return self._stream

    # For the engine

    @property
    def chunks(self) -> int:
        """How many are made."""
        assert self._timeline is not None
        return self._timeline.index

    @property
    def remaining(self) -> float:
        """Seconds of video that may still be made."""
        return self.terms.seconds - self._made() / self._plan.section.fps

    def _made(self) -> int:
        """Frames that are made, or in the making."""
        return self._plan.chunking.frames(self.chunks).start

    @property
    def over(self) -> bool:
        """Whether it is as long as it may be."""
        return self._made() >= self._limit

    def demand(self) -> Demand | None:
        """What it asks of the device; None if nothing, for now."""
        if self.progress.paused or self.over:
            return None
        fps = self._plan.section.fps
        chunk = len(self._plan.chunking.frames(self.chunks))
        return Demand(self._made() / fps, ahead(chunk / fps, self._making), self._playhead)

    @property
    def ready(self) -> bool:
        """Whether `make` would begin at once."""
        return self.stream.ready

    def make(self) -> ChunkReport | None:
        """Make a chunk; errors as `Session.__next__`'s."""
        report = self.stream.make()
        if report is not None:
            graphs, decoding = report.graphs, report.decoding
            self._seconds = Seconds(
                step=graphs.get("step", 0.0),
                commit=graphs.get("commit", 0.0),
                text=report.text,
                decode=decoding["decode"],
                wait=report.waited,
            )
        return report

    def fail(self, error: Exception) -> None:
        """Have an error told to the client."""
        self.failure = error
        self._changed()

    # For the session

    def begun(self, chunk: Chunk) -> None:
        """Take in which chunk is made, before any of its frames comes."""
        self._chunks.append((chunk, time.monotonic()))

    def deliver(self, video: Tensor) -> None:
        """Encode a part of a chunk's video, [1, 3, F, H, W] in [-1, 1]; send it with the last."""
        (chunk, began), frames = self._chunks[0], pixels(video)
        assert self._writer is not None and self.beginning is not None
        self._writer.write(frames, keyframe=self._encoded == 0)
        self._encoded += len(frames)
        if self._encoded < len(chunk.frames):
            return
        self._encoded = 0
        self._chunks.popleft()
        self._making = time.monotonic() - began
        data = b"".join(self._fragments)
        self._fragments.clear()
        with self._lock:
            given = [self.progress.events.pop(r.number, None) for r in chunk.receipts]
            names = [name for name in given if name is not None]
            asked = [self._asked.pop(name) for name in names if name in self._asked]
            self._shown.extend((chunk.frames.start, when) for when in asked)
            sent = chunk.frames.stop / self._plan.section.fps
            buffered = max(sent - self._playhead.position, 0.0)
            self._playhead = replace(self._playhead, buffered=buffered)
        message = ChunkMetadata(
            sequence=self.progress.sequence,
            generation_chunk_index=chunk.index,
            first_frame=chunk.frames.start,
            num_frames=len(chunk.frames),
            keyframe=True,
            byte_length=len(data),
            started_event_ids=tuple(names),
            seconds=self._seconds,
        )
        if chunk.index == 0:
            self._metrics.first_frame_seconds.observe(time.monotonic() - self._began)
        self.progress.sequence += 1
        self.ring.add(Part(self.beginning, message, data))
        self._changed()

    # For the connection

    def played(self, position: float, buffered: float) -> None:
        """Take in where the player is: it may not be beyond what was made."""
        made = self._made() / self._plan.section.fps
        position = min(position, made)
        now = time.monotonic()
        with self._lock:
            buffered = min(buffered, made - position)
            self._playhead = Playhead(position, buffered, now)
        self._metrics.client_buffer_seconds.observe(buffered)
        while self._shown and self._shown[0][0] / self._plan.section.fps <= position:
            frame, asked = self._shown.popleft()
            seen = now - (position - frame / self._plan.section.fps)
            self._metrics.switch_visible_seconds.observe(max(seen - asked, 0.0))

    def interact(self, name: str, event: Event) -> InteractionQueued:
        """Change what is to come. What comes again is answered as before, and changes nothing.

        Raises:
            ValueError: no chunk is left that could show it, or its name was another event's.
        """
        return self._once(name, event.model_dump_json(), lambda: self._change(name, event))

    def _change(self, name: str, event: Event) -> InteractionQueued:
        stream, terms = self.stream, self.terms
        if self.over:
            raise ValueError("event: the stream is as long as it may be; start another")
        if len(self.progress.events) >= _WAITING:
            raise ValueError(f"event: {_WAITING} wait already; send it once one of them is visible")
        with self._lock:
            if event.append is not None:
                self._check_room(len(event.append))
                receipt = stream.append(event.append)
            elif event.cut:
                receipt = stream.cut(event.prompt or "", event.seconds or SHOT_SECONDS)
            else:
                recache = terms.recache if event.recache is None else event.recache
                receipt = stream.switch(event.prompt or "", recache)
            self.progress.events[receipt.number] = name
            self._asked[name] = time.monotonic()
        return _queued(name, receipt)

    def _check_room(self, shots: int) -> None:
        """Check that shots can follow all others."""
        assert self._timeline is not None
        ahead = self._timeline.chunks
        if ahead and ahead[-1].frames.stop >= self._limit:
            raise ValueError("append: the shots before it last until the stream's end; cut instead")
        if len({chunk.shot for chunk in ahead}) + shots > 2 * MOST_SHOTS:
            raise ValueError(
                f"append: more than {2 * MOST_SHOTS} shots are ahead; send it once some are over"
            )

    def hold(self, paused: bool, name: str | None) -> InteractionQueued | None:
        """Pause, or play on; answered if it has a name, as `interact`."""
        if name is not None:
            return self._once(name, f"paused: {paused}", lambda: _queued(name, self._hold(paused)))
        self._hold(paused)
        return None

    def _hold(self, paused: bool) -> Receipt:
        receipt = self.stream.pause() if paused else self.stream.play()
        self.progress.paused = paused
        self.paused_at = time.monotonic()
        return receipt

    def _once(
        self, name: str, asked: str, act: Callable[[], InteractionQueued]
    ) -> InteractionQueued:
        answered, digest = self.progress.answered, hashlib.sha256(asked.encode()).hexdigest()
        if name not in answered:
            answered[name] = Answered(digest, act())
            if len(answered) > _REMEMBERED:
                del answered[next(iter(answered))]
        elif answered[name].asked != digest:
            raise ValueError(f"event_id: {name} was another event's; give each its own")
        return answered[name].answer


def _queued(name: str, receipt: Receipt) -> InteractionQueued:
    return InteractionQueued(event_id=name, event=receipt.event, received=receipt.received)
