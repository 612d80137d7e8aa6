"""Slots: what a session has to itself while it runs, used again by the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from weakref import WeakSet

from lltk.stream.decoder import DecoderState, LatentDecoder
from lltk.stream.runtimes import Runtime


@dataclass(frozen=True, eq=False)
class Slot:
    """A session's memory, and on a GPU the CUDA graphs that are recorded over it.

    Attributes:
        runtimes: pages and prompts' K/V: the prompt's; with guidance, then the negative prompt's.
        decoder: feature caches.
    """

    runtimes: Sequence[Runtime]
    decoder: LatentDecoder

    def clear(self) -> None:
        """Make it as new for the next session, but for its CUDA graphs."""
        with self.runtimes[0].lane.turn():
            for runtime in self.runtimes:
                runtime.clear()
        self.decoder.state = DecoderState()


class Slots:
    """Hands out slots, and makes one where none is free.

    Args:
        make: makes a slot.
        check: raises ValueError if there is no room for another slot. The first one has room.
        limit: how many may be in use at once; None for no limit.
        cost: what a slot needs, for people to read.
    """

    def __init__(
        self, make: Callable[[], Slot], check: Callable[[], None], limit: int | None, cost: str
    ) -> None:
        self._make = make
        self._check = check
        self._limit = limit
        self._cost = cost
        self._lock = Lock()
        self._free: list[Slot] = []
        self._every: WeakSet[Slot] = WeakSet()  # an abandoned session's slot goes with it

    def take(self) -> Slot:
        """A slot as new.

        Raises:
            ValueError: as many are in use as may be, or there is no room for another.
        """
        with self._lock:
            slot = self._free.pop() if self._free else self._new()
        slot.clear()
        return slot

    def give_back(self, slot: Slot) -> None:
        """Let another session have a slot."""
        assert slot not in self._free
        self._free.append(slot)

    def _new(self) -> Slot:
        if self._limit is not None and len(self._every) >= self._limit:
            raise ValueError(
                f"sessions: {self._limit} are open, as many as load_models allows; leave the block "
                f"of one, or allow more (each needs {self._cost})"
            )
        if self._every:
            self._check()
        slot = self._make()
        self._every.add(slot)
        return slot
