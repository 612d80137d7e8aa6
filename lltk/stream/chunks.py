"""The chunks that a video is made in, and how shots become chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lltk.stream.script import SCENE_CUT, Shot

MOST_CHUNKS = 20_000
"""Chunks of a script: some hours of video. A longer one is a slip."""


@dataclass(frozen=True)
class Receipt:
    """The acknowledgement of an event, such as a prompt switch.

    Attributes:
        number: counts a session's events from 0, so that it tells receipts apart.
        event: ``switch``, ``append``, ``cut``, ``pause`` or ``play``.
        received: index of the first chunk that had not begun when the event came.
        applied: index of the chunk from which the event acts; None as long as it waits for that.
    """

    number: int
    event: str
    received: int
    applied: int | None = None


@dataclass(frozen=True)
class Chunk:
    """One chunk of a video.

    Attributes:
        index: its place in the video, from 0.
        shot: the place of its shot in the video, from 0.
        cuts: scene cuts of the video so far; the one that opens this chunk's shot counts.
        prompt: the text to encode, the scene-cut prefix included.
        opens_shot: whether it is the first of a shot that follows a cut or begins the video.
        frames: its video frames.
        recache: whether held chunks are committed again under its prompt if that is a new one.
        receipts: of the events that act from this chunk.
    """

    index: int
    shot: int
    cuts: int
    prompt: str
    opens_shot: bool
    frames: range
    recache: bool = False
    receipts: tuple[Receipt, ...] = ()


@dataclass(frozen=True)
class ShotLength:
    """What a shot's length became.

    Attributes:
        asked: seconds in the script.
        chunks: whole chunks it was rounded to.
        frames: video frames of these.
    """

    asked: float
    chunks: int
    frames: int


@dataclass(frozen=True)
class Chunking:
    """How shots become chunks.

    Attributes:
        size: C, latent frames a chunk.
        fps: video frames a second.
        stride: video frames a latent frame (``ModelSpec.stride[0]``); the first latent frame of a
            video is one video frame.
        scene_cut: what precedes the caption in the first chunk after a cut.
        recache: whether a prompt that changes without a cut renews the cache. A live switch may
            say otherwise.

    Raises:
        ValueError: ``fps`` is not positive.
    """

    size: int
    fps: float
    stride: int = 4
    scene_cut: str = SCENE_CUT
    recache: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"fps: {self.fps:g} is not a frame rate; write a positive number")

    def frames(self, index: int) -> range:
        """Video frames of a chunk: stride·C, and stride·C - (stride - 1) in a video's first."""
        length = self.stride * self.size
        start, stop = (max(i * length - (self.stride - 1), 0) for i in (index, index + 1))
        return range(start, stop)

    def lengths(self, script: Sequence[Shot], first: int = 0) -> list[ShotLength]:
        """Round each shot to the nearest number of whole chunks, at least one.

        Args:
            script: the shots.
            first: index of their first chunk.
        """
        result: list[ShotLength] = []
        later = self.stride * self.size
        for shot in script:
            opening = len(self.frames(first))
            further = max(int((shot.seconds * self.fps - opening) / later + 0.5), 0)
            result.append(ShotLength(shot.seconds, 1 + further, opening + further * later))
            first += 1 + further
        return result

    def statement(self, script: Sequence[Shot]) -> str:
        """What was asked and what it became: a line on the rule, then a line a shot."""
        opening, later = (len(self.frames(index)) for index in (0, 1))
        lines = [
            f"a shot is whole chunks, at least one: {later} frames each, {opening} for the video's "
            f"first, at {self.fps:g} fps"
        ]
        for number, shot in enumerate(self.lengths(script), 1):
            lines.append(
                f"shot {number}: {shot.asked:g} s asked, {shot.frames / self.fps:.2f} s made "
                f"({shot.frames} frames, chunks: {shot.chunks})"
            )
        return "\n".join(lines)

    def chunks(self, script: Sequence[Shot], after: Chunk | None = None) -> list[Chunk]:
        """The chunks of shots, in order.

        Args:
            script: the shots.
            after: the chunk that they follow; None where they begin the video.

        Raises:
            ValueError: they are more than any script should have.
        """
        chunks: list[Chunk] = []
        first = 0 if after is None else after.index + 1
        lengths = self.lengths(script, first)
        if (count := sum(length.chunks for length in lengths)) > MOST_CHUNKS:
            raise ValueError(
                f"script: {count} chunks at {self.fps:g} fps are more than {MOST_CHUNKS}; shorten "
                "it, or append shots while it runs"
            )
        for shot, length in zip(script, lengths, strict=True):
            for k in range(length.chunks):
                after = self._chunk(shot, k == 0, after)
                chunks.append(after)
        return chunks

    def _chunk(self, shot: Shot, first: bool, before: Chunk | None) -> Chunk:
        """A shot's first chunk or a later one, after the chunk before it."""
        if before is None:
            return Chunk(0, 0, 0, shot.caption, True, self.frames(0))
        cut, index = first and shot.cut, before.index + 1
        return Chunk(
            index,
            before.shot + first,
            before.cuts + cut,
            self._marked(shot.caption, cut),
            cut,
            self.frames(index),
            self.recache and first and not cut,
        )

    def switched(self, chunk: Chunk, prompt: str) -> Chunk:
        """The chunk with another prompt, which the scene-cut prefix precedes if it comes after a
        cut."""
        return replace(chunk, prompt=self._marked(prompt, chunk.opens_shot and chunk.index > 0))

    def _marked(self, prompt: str, cut: bool) -> str:
        return self.scene_cut + prompt if cut else prompt

    def going_on(self, after: Chunk) -> Chunk:
        """One more chunk of the same shot."""
        index = after.index + 1
        return replace(
            after,
            index=index,
            prompt=after.prompt.removeprefix(self.scene_cut) if after.opens_shot else after.prompt,
            opens_shot=False,
            frames=self.frames(index),
            recache=False,
            receipts=(),
        )

    def renumbered(self, chunks: Sequence[Chunk], after: Chunk) -> list[Chunk]:
        """Whole shots' chunks as they are where they follow another chunk.

        Args:
            chunks: consecutive ones, of which the first is a shot's first.
            after: the chunk that they follow.
        """
        if not chunks:
            return []
        opening = chunks[0]
        index = after.index + 1 - opening.index
        shot = after.shot + 1 - opening.shot
        cuts = after.cuts + opening.opens_shot - opening.cuts
        return [
            replace(
                chunk,
                index=chunk.index + index,
                shot=chunk.shot + shot,
                cuts=chunk.cuts + cuts,
                frames=self.frames(chunk.index + index),
            )
            for chunk in chunks
        ]
