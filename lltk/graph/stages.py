"""The stages of a Program, in order."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """How far a Program is: captured → canonical → causal → … → lowered."""

    CAPTURED = 0
    CANONICAL = 1
    CAUSAL = 2
    QUANTISED = 3
    PARTITIONED = 4
    REGIONAL = 5
    LOWERED = 6

    def __str__(self) -> str:
        return self.name.lower()
