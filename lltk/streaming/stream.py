"""A stream that runs: a session over loaded models, and the file that it can go on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lltk.stream.chunks import Receipt
from lltk.stream.prompts import Prompts
from lltk.stream.report import ChunkReport
from lltk.stream.script import Shot
from lltk.stream.session import Session
from lltk.stream.state import save_state

if TYPE_CHECKING:
    from lltk.streaming.models import Models


class Stream:
    """A session over loaded models; iterating makes a chunk at a time.

    ::

        with models.open(sink, script) as stream:
            for report in stream:
                …
            stream.save(state)

    Leaving the block waits for the last frames and lets another session have the memory. Any thread
    may call `switch`, `append`, `cut`, `pause` and `play`; see `lltk.stream.timeline.Timeline`.

    Args:
        models: what it runs on.
        session: ready to run.
        prompts: the session's.
        release: called once, when the session is over.
    """

    def __init__(
        self, models: Models, session: Session, prompts: Prompts, release: Callable[[], None]
    ) -> None:
        self.models = models
        self.session = session
        self._prompts = prompts
        self._release: Callable[[], None] | None = release

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> ChunkReport:
        """Make the next chunk; errors as `Session.__next__`'s."""
        report = next(self.session)
        self._prompts.expect(self.session.timeline.prompts)
        return report

    def make(self) -> ChunkReport | None:
        """Make the next chunk without waiting for a pause to end; see `Session.make`."""
        report = self.session.make()
        if report is not None:
            self._prompts.expect(self.session.timeline.prompts)
        return report

    @property
    def ready(self) -> bool:
        """Whether `make` would begin at once: the prompt is encoded, the decoder has room.

        Ask in the thread that makes the chunks.
        """
        prompts = self.session.timeline.prompts[:1]
        return self._prompts.done(prompts) and self.session.delivery.has_room

    def switch(self, prompt: str, recache: bool | None = None) -> Receipt:
        """Show something else for the rest of the running shot; see `Timeline.switch`."""
        return self._expecting(self.session.timeline.switch(prompt, recache))

    def append(self, script: Sequence[Shot]) -> Receipt:
        """Show more shots after all others; see `Timeline.append`."""
        return self._expecting(self.session.timeline.append(script))

    def cut(self, caption: str, seconds: float) -> Receipt:
        """End the running shot and show a new one, after a scene cut; see `Timeline.cut`."""
        return self._expecting(self.session.timeline.cut(caption, seconds))

    def pause(self) -> Receipt:
        """Begin no chunk until `play`; the chunk in flight is made."""
        return self.session.timeline.pause()

    def play(self) -> Receipt:
        """End a pause."""
        return self.session.timeline.play()

    def save(self, path: Path) -> None:
        """Write what `Models.open` needs to go on from here, bit for bit.

        Of several ranks each writes a file of its own, rank 0 the one that is named.

        Raises:
            ValueError: the session was interrupted within a chunk, or in decoding one, a page is
                broken, or the stream's block is left.
            OSError: the file cannot be written.
        """
        if self._release is None:
            raise ValueError("save: the stream is closed; save before its block is left")
        state = self.session.state()
        save_state(own_file(path, self.models.plan.rank), state, self.models.identity)

    def close(self) -> None:
        """Wait for the last frames; raises what decoding or the sink raised."""
        self.session.close()

    def __enter__(self) -> Stream:
        self.session.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._prompts.expect(())
        try:
            self.session.__exit__(kind, error, trace)
        finally:
            release, self._release = self._release, None
            if release is not None:
                release()

    def _expecting(self, receipt: Receipt) -> Receipt:
        """Have the prompts encoded that an event brought."""
        self._prompts.expect(self.session.timeline.prompts)
        return receipt


def own_file(path: Path, rank: int) -> Path:
    """Where a rank keeps its part of a state."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
