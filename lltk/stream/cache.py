"""A session's cache: the chunks that it holds, written as they are made and written again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lltk.parallel.transfer import upload
from lltk.stream.chunks import Chunk
from lltk.stream.denoise import not_finite
from lltk.stream.pages import PageTable
from lltk.stream.positions import bounded_positions, frame_positions
from lltk.stream.runtimes import Runtime
from lltk.stream.timing import Stopwatch


@dataclass(frozen=True)
class Held:
    """A chunk in the cache.

    Attributes:
        chunk: which.
        clean: its clean latents, float32 [B, C, F, h, w].
    """

    chunk: Chunk
    clean: Tensor


@dataclass(frozen=True)
class CacheState:
    """What a cache holds, without its pages.

    Attributes:
        table: `PageTable.state`.
        held: the chunks, oldest first.
    """

    table: Mapping[str, Any]
    held: tuple[Held, ...]


@dataclass(frozen=True)
class _Written:
    """A page that was written and has not been checked yet.

    Attributes:
        during: ``commit`` or ``recache``.
        runtime: whose page it is.
        given: what the runtime was given: latents, positions, table and slot.
        magnitudes: the page's; see `Runtime.magnitudes`.
    """

    during: str
    runtime: Runtime
    given: tuple[Tensor, Tensor, Sequence[int], int]
    magnitudes: Tensor


class Cache:
    """The pages of a session's runtimes, and what is needed to write them again.

    Args:
        runtimes: the prompt's; with guidance, then the negative prompt's. Both hold the same
            chunks in the same pages.
        shot_offset: see `frame_positions`, or `bounded_positions` where pages are turned when they
            are read.
        watch: measures what writes a page, as ``commit`` and ``recache``.
    """

    def __init__(self, runtimes: Sequence[Runtime], shot_offset: float, watch: Stopwatch) -> None:
        self.table = PageTable(runtimes[0].geometry)
        """Which chunks the cache holds, and where."""
        self._runtimes = runtimes
        self._shot_offset = shot_offset
        self._watch = watch
        self._held: dict[int, Held] = {}
        self._unchecked: list[_Written] = []

    @property
    def state(self) -> CacheState:
        """What it holds, without the pages themselves, which are the runtimes'."""
        return CacheState(self.table.state, tuple(self._held.values()))

    def restore(self, state: CacheState) -> None:
        """Go on from a `state` of the same geometry."""
        device = self._runtimes[0].device
        held = (replace(each, clean=each.clean.to(device)) for each in state.held)
        self._held = {each.chunk.index: each for each in held}
        self.table.restore(state.table)

    def positions(self, chunk: Chunk) -> Tensor:
        """The RoPE positions that a chunk's passes take, on the runtimes' device.

        They are float64 [F], or [N * F + F] where pages are turned when they are read; see
        `Runtime.step`.
        """
        runtime, offset = self._runtimes[0], self._shot_offset
        size = runtime.geometry.chunk
        if runtime.turns_pages:
            older = [held.chunk.cuts for i, held in self._held.items() if i < chunk.index]
            positions = bounded_positions([*older, chunk.cuts], size, offset)
        else:
            positions = frame_positions([chunk.cuts], size, offset, chunk.index)
        return upload(positions, runtime.device)

    def commit(self, chunk: Chunk, clean: Tensor) -> None:
        """Write a finished chunk's page, and forget the chunks that the window lets go.

        Args:
            chunk: the table's next.
            clean: its latents, float32 [B, C, F, h, w].

        Raises:
            ValueError: a page is not finite; the chunk is then not held.
        """
        pages = self.table.next_pages()
        for runtime in self._runtimes:
            self._write("commit", runtime, Held(chunk, clean), pages.table, pages.slot)
        self.check(chunk.index)
        self.table.commit(chunk.opens_shot)
        every = {**self._held, chunk.index: Held(chunk, clean)}
        self._held = {index: every[index] for index in self.table.slots}

    def recache(self) -> None:
        """Write the held chunks again under the prompt, oldest first; sinks stay as they are.

        Each sees the older ones as they are then. The negative prompt does not change, so neither
        do its pages. `check` tells whether they are finite.
        """
        slots, sinks = self.table.slots, self.table.sinks()
        for index, slot in slots.items():
            if index not in sinks:
                older = [page for other, page in slots.items() if other < index]
                self._write("recache", self._runtimes[0], self._held[index], older, slot)

    def check(self, chunk: int) -> None:
        """Wait for the pages that were written since the last check.

        Args:
            chunk: the index of the chunk in flight, for the error.

        Raises:
            ValueError: one is not finite; says where that begins.
        """
        written, self._unchecked = self._unchecked, []
        if not written or bool(torch.stack([w.magnitudes for w in written]).isfinite().all()):
            return
        first = next(w for w in written if not w.magnitudes.isfinite().all())
        where = first.runtime.first_bad_commit(*first.given, first.magnitudes)
        raise not_finite(chunk, first.during, where)

    def _write(
        self, during: str, runtime: Runtime, held: Held, table: Sequence[int], slot: int
    ) -> None:
        latents = held.clean.to(runtime.dtype)
        given = latents, self.positions(held.chunk), table, slot
        with self._watch.measure(during):
            runtime.commit(*given)
        self._unchecked.append(_Written(during, runtime, given, runtime.magnitudes(slot)))
