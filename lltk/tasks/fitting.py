"""With which keys a training run would need less memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING

from lltk.graph.facts import Ranks
from lltk.graph.memory import readable, total

if TYPE_CHECKING:
    from lltk.tasks.transformer import TransformerPlan

_SAVES = {
    "keep_attention": 0,
    "recompute": True,
    "ema_decay": None,
    "optimiser": "adamw_8bit",
    "weights": "compute",
}
"""Values of ``train.…`` that save memory; those that cost least come first."""
_NOT_OFFLOADED = ("optimiser", "weights")
"""Keys whose values do not go with ``train.offload``."""
MOST_RANKS = 64
"""No more are proposed."""


def ways_to_fit(plan: TransformerPlan, room: int) -> list[str]:
    """The first ways in which a run would need no more than so many bytes on each device.

    Args:
        plan: of the run as it is.
        room: bytes of a device.

    Returns:
        Changes of keys, and what is needed with them: on as many ranks, and on the fewest on which
        that is possible. Empty if there is none.
    """
    return first_that_fit(room, sparing(plan), _offloading(plan), _shared(plan))


def first_that_fit(room: int, *kinds: Iterator[tuple[str, int]]) -> list[str]:
    """Of each kind of ways, with the bytes that they need, the first that fits, in words."""
    found = []
    for ways in kinds:
        fits = ((way, size) for way, size in ways if size <= room)
        if (first := next(fits, None)) is not None:
            found.append(f"{first[0]}: {readable(first[1])}")
    return found


def sparing(plan: TransformerPlan) -> Iterator[tuple[str, int]]:
    """Ever more keys that save memory, on the same ranks."""
    changes: list[str] = []
    for key, value in _SAVES.items():
        section = plan.section
        if getattr(section, key) == value or (section.offload and key in _NOT_OFFLOADED):
            continue
        plan = replace(plan, section=section.model_copy(update={key: value}))
        shown = value if isinstance(value, str) else json.dumps(value)
        changes.append(f"--set train.{key}={shown}")
        yield " ".join(changes), total(plan.memory)


def _offloading(plan: TransformerPlan) -> Iterator[tuple[str, int]]:
    """Weights in float32 and moments in main memory, and no more kept of blocks than need be."""
    section = plan.section
    if section.offload or section.shards > 1 or section.optimiser != "adamw":
        return
    moved = replace(plan, section=section.model_copy(update={"offload": True}))
    yield "--set train.offload=true", total(moved.memory)
    for keys, size in sparing(moved):
        yield f"--set train.offload=true {keys}", size


def _shared(plan: TransformerPlan) -> Iterator[tuple[str, int]]:
    """The same keys on ever more ranks, which share clips and weights."""
    program, section = plan.program, plan.section
    most = gcd(program.spec.heads, program.geometry.chunks)
    ranks = 2
    while ranks <= MOST_RANKS:
        sequence = gcd(most, ranks)
        shared = replace(program, facts={**program.facts, Ranks: Ranks(sequence)})
        own = section.model_copy(update={"shards": ranks})
        if sequence >= plan.sequence and ranks > section.shards:
            keys = f"--set passes.balanced_sp.size={sequence} --set train.shards={ranks}"
            needed = total(replace(plan, program=shared, section=own).memory)
            yield f"{ranks} ranks, {keys}", needed
        ranks *= 2
