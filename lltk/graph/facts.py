"""What passes leave behind for whatever comes after them.

A fact is a frozen dataclass. A pass leaves it with ``program.leave(Ranks(2))``, and later code
reads it with ``program.fact(Ranks).count``. A Program holds at most one fact of a class. Where it
holds none, the defaults of the class's fields hold, so every field has one. A pass may leave facts
of a class of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trainable:
    """Which parameters train.

    Attributes:
        names: of the parameters; None for all of them.
    """

    names: frozenset[str] | None = None


@dataclass(frozen=True)
class ChannelsLastWeights:
    """Which convolutions' weights lie in memory with channels last when they run.

    Attributes:
        names: of the weights.
    """

    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class HighSteps:
    """Which denoising passes of a chunk run the graph ``step_high`` instead of ``step``.

    Attributes:
        indices: of the passes, the first of a chunk being 0.
    """

    indices: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Ranks:
    """How many processes run the Program together.

    Attributes:
        count: 1 or more.
    """

    count: int = 1
