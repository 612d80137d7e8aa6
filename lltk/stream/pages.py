"""The page table: which chunks a chunk attends to, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lltk.graph.geometry import Geometry


@dataclass(frozen=True)
class ChunkPages:
    """Where the chunk in flight goes and what it attends to.

    Attributes:
        chunk: its index in the video.
        slot: the page it will be committed to.
        table: committed pages it attends to besides itself.
    """

    chunk: int
    slot: int
    table: tuple[int, ...]


class PageTable:
    """Sinks and a rolling window over pages of one chunk each; nothing is ever moved.

    A chunk attends to the global sink (first ``sink`` frames of the video), the shot sink (first
    ``sink`` frames, as far as committed, of the latest shot whose opening chunk is committed) and
    the newest other chunks still held, at most ``window`` frames in all with itself. So the chunk
    that opens a shot still attends to the sink of the shot before, which ages out afterwards. An
    evicted chunk never returns.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._pages = geometry.pages
        self._sink = geometry.sink // geometry.chunk
        self._shot_sink = geometry.shot_sink
        self._slots: dict[int, int] = {}
        """Held chunks, oldest first, and their pages."""
        self._shot = 0
        """Opening chunk of the latest shot that is committed."""
        self._next = 0

    def next_pages(self) -> ChunkPages:
        """The next chunk's pages; the same until it is committed."""
        free = min(set(range(self._pages)) - set(self._slots.values()))
        return ChunkPages(self._next, free, tuple(self._slots.values()))

    @property
    def slots(self) -> dict[int, int]:
        """Held chunks, oldest first, and their pages; a copy."""
        return dict(self._slots)

    @property
    def state(self) -> dict[str, Any]:
        """All it knows, as plain data."""
        return {"slots": list(self._slots.items()), "shot": self._shot, "next": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of the same geometry."""
        self._slots = {int(chunk): int(slot) for chunk, slot in state["slots"]}
        self._shot, self._next = int(state["shot"]), int(state["next"])

    def commit(self, opens_shot: bool = False) -> ChunkPages:
        """Take the chunk in flight into the cache and evict what no longer fits.

        Args:
            opens_shot: whether this chunk is the first of a shot.

        Returns:
            Its pages.
        """
        pages = self.next_pages()
        self._slots[pages.chunk] = pages.slot
        self._next += 1
        if opens_shot:
            self._shot = pages.chunk
        ordinary = [chunk for chunk in self._slots if chunk not in self.sinks()]
        excess = len(self._slots) - (self._pages - 1)
        for chunk in ordinary[: max(excess, 0)]:
            del self._slots[chunk]
        return pages

    def sinks(self) -> frozenset[int]:
        """Committed chunks that must stay: the global sink and the latest shot's."""
        starts = {0, self._shot} if self._shot_sink else {0}
        wanted = {start + i for start in starts for i in range(self._sink)}
        return frozenset(wanted & self._slots.keys())
