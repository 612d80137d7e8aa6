"""Sessions that several ranks make together: rank 0 leads, and the others follow.

::

    if ranks.rank > 0:
        follow(load_models(plan), orders)
        return
    models = LeadingModels(plan, orders)  # used as any `Models`, from any thread
    …
    orders.give(None)  # lets the others end

Before each chunk rank 0 tells the others whose it is, and which events came since that session's
chunk before. It tells them too when a session opens, is saved and ends. One of these things is done
at a time, in the same order on every rank, so that exchanges of two sessions never meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from av.error import FFmpegError
from torch import Tensor

from lltk.parallel.groups import LostRank
from lltk.parallel.orders import FAILURES, Orders
from lltk.stream.chunks import Chunk, Receipt
from lltk.stream.prompts import Prompts
from lltk.stream.recipe import EVERY_RANK
from lltk.stream.report import ChunkReport
from lltk.stream.script import Shot
from lltk.stream.session import Session
from lltk.streaming.models import Models
from lltk.streaming.plan import Plan
from lltk.streaming.stream import Stream

Call = tuple[str, tuple[Any, ...]]
"""A method of `Stream`, and its arguments."""


@dataclass(frozen=True)
class _Order:
    """What to do to a session: open it, if ``opening`` has arguments of `Models.open`, or calls."""

    session: int
    calls: Sequence[Call] = ()
    opening: Mapping[str, Any] | None = None


class _Decoding:
    """Has one session's frames decoded at a time, where ranks decode each frame together.

    Each decodes in a thread of its own, and they meet by the order of what they decode.
    """

    def __init__(self, plan: Plan) -> None:
        self._together = plan.section.decoder.device == EVERY_RANK
        self._latest: Stream | None = None

    def turn_to(self, stream: Stream | None) -> None:
        """Wait until another session's frames are decoded."""
        if self._together and self._latest is not None and self._latest is not stream:
            self._latest.session.delivery.rest()
        self._latest = stream


class _Sink:
    """A sink whose failure stops no chunk in its middle, where the other ranks wait."""

    def __init__(self, sink: Callable[[Tensor], None]) -> None:
        self._sink = sink
        self._failure: ValueError | OSError | FFmpegError | None = None

    def __call__(self, video: Tensor) -> None:
        if self._failure is None:
            try:
                self._sink(video)
            except (ValueError, OSError, FFmpegError) as error:
                self._failure = error

    def check(self) -> None:
        """Raise what the sink raised."""
        if self._failure is not None:
            raise self._failure


class _Events:
    """A session's events that the other ranks do not know of."""

    def __init__(self) -> None:
        self.lock = Lock()
        """Held while an event is applied here; who holds it has none come."""
        self._calls: list[tuple[int, Call]] = []

    def note(self, act: Callable[..., Receipt], *given: Any) -> Receipt:
        """Apply an event here, and keep it for the others."""
        with self.lock:
            receipt = act(*given)
            self._calls.append((receipt.received, (act.__name__, given)))
        return receipt

    def take(self, chunk: int | None = None) -> list[Call]:
        """Those that came before a chunk began; without a chunk all. Call it with the lock."""
        known = [call for call in self._calls if chunk is None or call[0] <= chunk]
        self._calls = self._calls[len(known) :]
        return [call for _, call in known]


class LeadingModels(Models):
    """Rank 0's models: what is done with them, the other ranks do too.

    A chunk that fails on one rank alone leaves the others within it. Then `LostRank` is raised,
    and nothing more can be made.

    Args:
        plan: with weights, for several ranks.
        orders: to the other ranks, which `follow` them.
        sessions: how many may be open at once; None for as many as fit into memory.
    """

    def __init__(self, plan: Plan, orders: Orders, sessions: int | None = None) -> None:
        super().__init__(plan, sessions=sessions)
        self.orders = orders
        self._turn = Lock()
        self._decoding = _Decoding(plan)
        self._numbers = count()

    def open(
        self,
        sink: Callable[[Tensor], None] | None,
        script: Sequence[Shot] = (),
        *,
        image: Tensor | None = None,
        seed: int | None = None,
        resume: Path | None = None,
        endless: bool = False,
        begun: Callable[[Chunk], None] = lambda chunk: None,
    ) -> Stream:
        """Open a session on every rank; see `Models.open`.

        Raises:
            ValueError, OSError, OutOfMemoryError: a rank cannot open it. Then none has.
        """
        number, events = next(self._numbers), _Events()
        kept = None if sink is None else _Sink(sink)

        def beginning(chunk: Chunk) -> None:
            with events.lock:
                calls = events.take(chunk.index)
            self.orders.give(_Order(number, (*calls, ("make", ()))))
            begun(chunk)

        def opened() -> Stream:
            parts = self._opened(kept, script, image, seed, resume, endless, beginning)
            return LeadingStream(self, *parts, number, events, kept)

        given = {"script": script, "image": image, "seed": seed, "resume": resume}
        with self._turn:
            self.orders.give(_Order(number, opening=given | {"endless": endless}))
            return _opened_together(opened, self.orders)

    @contextmanager
    def turn(self, stream: Stream, last: bool = False) -> Iterator[None]:
        """Have the ranks within the block, to do something to a stream."""
        with self._turn:
            self._decoding.turn_to(stream)
            try:
                yield
            finally:
                if last:
                    self._decoding.turn_to(None)


class LeadingStream(Stream):
    """A stream of `LeadingModels`.

    Args:
        models, session, prompts, release: as `Stream`'s.
        number: of the session.
        events: of the session; empty.
        sink: takes the video.
    """

    def __init__(
        self,
        models: LeadingModels,
        session: Session,
        prompts: Prompts,
        release: Callable[[], None],
        number: int,
        events: _Events,
        sink: _Sink | None,
    ) -> None:
        super().__init__(models, session, prompts, release)
        self._leading = models
        self._number = number
        self._events = events
        self._sink = sink

    def __next__(self) -> ChunkReport:
        while self.session.timeline.wait():
            if report := self.make():
                return report
        raise StopIteration

    def make(self) -> ChunkReport | None:
        """Make the next chunk, on all ranks; see `Stream.make`.

        Raises:
            ValueError, OSError, FFmpegError: what the sink raised for earlier chunks.
            LostRank: another rank has stopped, or the chunk failed.
        """
        with self._leading.turn(self):
            self._check_sink()
            try:
                return super().make()
            except (*FAILURES, FFmpegError) as error:
                self._leading.orders.break_off()
                if isinstance(error, LostRank):
                    raise
                raise LostRank(
                    f"ranks: a chunk failed on rank 0 ({error}), and the others wait within it; "
                    "start again"
                ) from error

    def switch(self, prompt: str, recache: bool | None = None) -> Receipt:
        return self._events.note(super().switch, prompt, recache)

    def append(self, script: Sequence[Shot]) -> Receipt:
        return self._events.note(super().append, script)

    def cut(self, caption: str, seconds: float) -> Receipt:
        return self._events.note(super().cut, caption, seconds)

    def pause(self) -> Receipt:
        return self._events.note(super().pause)

    def play(self) -> Receipt:
        return self._events.note(super().play)

    def save(self, path: Path) -> None:
        """Have every rank write its part; see `Stream.save`.

        Raises:
            ValueError, OSError: a rank cannot write it.
        """
        with self._leading.turn(self), self._events.lock:
            self._order(*self._events.take(), ("save", (path,)))
            with self._leading.orders.together():
                self._check_sink()
                super().save(path)

    def __enter__(self) -> Stream:
        with self._leading.turn(self):
            self._order(("__enter__", ()))
            return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._leading.turn(self, last=True):
            self._order(("__exit__", (None, None, None)))
            self.session.delivery.rest()  # the others decode all that was submitted
            super().__exit__(kind, error, trace)
        if kind is None:
            self._check_sink()

    def _order(self, *calls: Call) -> None:
        self._leading.orders.give(_Order(self._number, calls))

    def _check_sink(self) -> None:
        if self._sink is not None:
            self._sink.check()


def follow(models: Models, orders: Orders) -> None:
    """Do what rank 0 does with its models, until it orders nothing more.

    Args:
        models: loaded, of another rank.
        orders: rank 0's.

    Raises:
        LostRank: another rank has stopped.
    """
    _ = models.identity  # which reads every weight: not when there is a hurry to save
    streams: dict[int, Stream] = {}
    decoding = _Decoding(models.plan)
    while (order := orders.take()) is not None:
        assert isinstance(order, _Order)
        if order.opening is not None:
            with _told_by_rank_0():
                opened = partial(models.open, None, **order.opening)
                streams[order.session] = _opened_together(opened, orders)
            continue
        stream = streams[order.session]
        decoding.turn_to(stream)
        for name, given in order.calls:
            if name == "save":
                with _told_by_rank_0(), orders.together():
                    stream.save(*given)
            else:
                made = getattr(stream, name)(*given)
                assert name != "make" or made is not None, "rank 0 began a chunk"
            if name == "__exit__":
                decoding.turn_to(None)
                del streams[order.session]


@contextmanager
def _told_by_rank_0() -> Iterator[None]:
    """Go on where all ranks know that a block could not be done."""
    try:
        yield
    except LostRank:
        raise
    except FAILURES:
        return


def _opened_together(opening: Callable[[], Stream], orders: Orders) -> Stream:
    """A stream that all ranks have opened, or none."""
    stream: Stream | None = None
    try:
        with orders.together():
            stream = opening()
    except FAILURES:
        if stream is not None:
            Stream.__exit__(stream, None, None, None)
        raise
    assert stream is not None
    return stream
